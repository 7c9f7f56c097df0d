// cublasLtMatmul by oneDNN's matmul primitive.
//
// oneDNN wants the destination in row order, which a column-order D is when transposed: D^T = op(B)^T op(A)^T. The
// operands are handed over as they lie in memory, with strides; oneDNN packs them as its kernels need. What the
// epilogues do beyond adding the bias is done here afterwards, in one pass over the fp32 result.
#include "cublasLt.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

#include "cuda_bf16.h"
#include "observer.h"
#include "runtime.h"

struct cublasLtContext {};
struct cublasLtMatmulPreference {};

struct cublasLtMatmulDesc {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    int32_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
    int32_t transa = CUBLAS_OP_N, transb = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr, *aux = nullptr;
    int64_t bias_batch_stride = 0, aux_ld = 0, aux_batch_stride = 0;
    int32_t bias_type = -1, aux_type = -1;  // -1: D's
};

struct cublasLtMatrixLayout {
    uint32_t type;
    int32_t order = CUBLASLT_ORDER_COL;
    uint64_t rows, columns;
    int64_t ld;
    int32_t batch_count = 1;
    int64_t batch_stride = 0;
};

namespace {

using Type = dnnl::memory::data_type;

constexpr uint32_t bias_bit = CUBLASLT_EPILOGUE_BIAS, gelu_bit = CUBLASLT_EPILOGUE_GELU, dgelu_bit = 64, aux_bit = 128,
                   bgrad_bit = 16;

// A matrix of a batch of them: element (b, i, j) is data[b * batch_stride + i * row_stride + j * column_stride].
struct Matrix {
    void* data = nullptr;
    Type type = Type::f32;
    int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0, batch = 1, batch_stride = 0;

    Matrix transposed() const { return {data, type, columns, rows, column_stride, row_stride, batch, batch_stride}; }
    Matrix at(int64_t b) const;
    // Elements from the first to the last one, gaps included.
    int64_t extent() const {
        return (batch - 1) * batch_stride + (rows - 1) * row_stride + (columns - 1) * column_stride + 1;
    }
};

struct Vector {
    void* data = nullptr;
    Type type = Type::f32;
    int64_t batch_stride = 0;
    Vector at(int64_t b) const;
};

// D = epilogue(alpha a b + beta c)
struct Product {
    Matrix a, b, c, d, aux;
    Vector bias;
    float alpha, beta;
    uint32_t epilogue;
};

size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

Matrix Matrix::at(int64_t b) const {
    Matrix result = *this;
    result.batch = 1;
    if (data != nullptr) result.data = static_cast<char*>(data) + size_t(b * batch_stride) * size_of(type);
    return result;
}
Vector Vector::at(int64_t b) const {
    if (data == nullptr) return *this;
    return {static_cast<char*>(data) + size_t(b * batch_stride) * size_of(type), type, batch_stride};
}

[[gnu::format(printf, 1, 2)]] cublasStatus_t unsupported(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("cublasLtMatmul on the CPU: not supported: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

float load(const void* data, Type type, int64_t i) {
    return type == Type::f32 ? static_cast<const float*>(data)[i] : float(static_cast<const __nv_bfloat16*>(data)[i]);
}
void store(void* data, Type type, int64_t i, float value) {
    if (type == Type::f32) static_cast<float*>(data)[i] = value;
    else static_cast<__nv_bfloat16*>(data)[i] = value;
}

// Calls visit(pointer) with the data as its own type, so that loops inside are compiled for it.
template <class Visit>
void with_type(void* data, Type type, Visit visit) {
    if (type == Type::f32) visit(static_cast<float*>(data));
    else visit(static_cast<__nv_bfloat16*>(data));
}

// Scratch memory that grows and stays. Each use has its own, as several are needed at a time.
enum class Scratch { primitive, result, a, b, bias, count };
void* scratch(Scratch use, size_t bytes) {
    struct Buffer {
        std::unique_ptr<char[]> data;
        size_t size = 0;
    };
    static thread_local std::array<Buffer, size_t(Scratch::count)> buffers;
    Buffer& buffer = buffers[size_t(use)];
    if (buffer.size < bytes) buffer.data.reset(new char[bytes + 64]), buffer.size = bytes;
    const auto address = reinterpret_cast<uintptr_t>(buffer.data.get());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

// ---------------------------------------------------------------------------------------------------------------
// oneDNN

const dnnl::engine& cpu_engine() {
    static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    return engine;
}

// Primitives take longer to make than a small product to compute; all that a program uses are kept.
struct Primitive {
    dnnl::matmul matmul;
    dnnl::memory::desc source, weights, destination, bias, scratchpad;
};

// Some of oneDNN's kernels look at strides that no element is reached by; so those are made to fit a dense matrix.
Matrix with_plain_strides(Matrix m) {
    if (m.columns == 1) m.column_stride = 1;
    else if (m.rows == 1) m.row_stride = m.column_stride == 1 ? m.columns : 1;
    return m;
}

dnnl::memory::desc describe(const Matrix& m) {
    if (m.batch == 1) return {{m.rows, m.columns}, m.type, dnnl::memory::dims{m.row_stride, m.column_stride}};
    return {{m.batch, m.rows, m.columns}, m.type, dnnl::memory::dims{m.batch_stride, m.row_stride, m.column_stride}};
}

std::shared_ptr<Primitive> make_primitive(const Matrix& source, const Matrix& weights, const Matrix& destination,
                                          const Vector& bias, float alpha, float beta) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (alpha != 1.0f) attributes.set_output_scales(0, {alpha});
    if (beta != 0.0f) {
        dnnl::post_ops operations;
        operations.append_sum(beta);
        attributes.set_post_ops(operations);
    }
    auto primitive = std::make_shared<Primitive>();
    primitive->source = describe(source);
    primitive->weights = describe(weights);
    primitive->destination = describe(destination);
    if (bias.data != nullptr) {
        primitive->bias = {{1, destination.columns}, bias.type, dnnl::memory::dims{destination.columns, 1}};
    }
    const dnnl::matmul::desc desc =
        bias.data != nullptr
            ? dnnl::matmul::desc(primitive->source, primitive->weights, primitive->bias, primitive->destination)
            : dnnl::matmul::desc(primitive->source, primitive->weights, primitive->destination);
    const dnnl::matmul::primitive_desc chosen(desc, attributes, cpu_engine());
    primitive->matmul = dnnl::matmul(chosen);
    primitive->scratchpad = chosen.scratchpad_desc();
    return primitive;
}

// The primitive for this product, or null where oneDNN has none on this CPU.
std::shared_ptr<Primitive> find_primitive(const Matrix& source, const Matrix& weights, const Matrix& destination,
                                          const Vector& bias, float alpha, float beta) {
    using Key = std::array<int64_t, 24>;
    static std::mutex mutex;
    static std::map<Key, std::shared_ptr<Primitive>> cache;
    Key key = {std::bit_cast<int32_t>(alpha), std::bit_cast<int32_t>(beta), bias.data != nullptr ? int(bias.type) : -1};
    size_t n = 3;
    for (const Matrix* m : {&source, &weights, &destination}) {
        for (const int64_t value :
             {int64_t(m->type), m->rows, m->columns, m->row_stride, m->column_stride, m->batch, m->batch_stride})
            key[n++] = value;
    }
    const std::lock_guard lock(mutex);
    const auto found = cache.find(key);
    if (found != cache.end()) return found->second;
    if (cache.size() >= 4096) cache.clear();  // a program whose shapes never repeat
    std::shared_ptr<Primitive> primitive;
    try {
        primitive = make_primitive(source, weights, destination, bias, alpha, beta);
    } catch (const dnnl::error& error) {
        if (error.status != dnnl_unimplemented) throw;
    }
    return cache[key] = primitive;
}

bool is_plain_fp32(const Matrix& m) { return m.type == Type::f32 && m.column_stride == 1 && m.batch == 1; }

// d = alpha a b + beta d + bias, d in row order; false where oneDNN cannot
bool multiply(const Matrix& a, const Matrix& b, const Matrix& d, const Vector& bias, float alpha, float beta) {
    const Matrix source = with_plain_strides(a), weights = with_plain_strides(b), destination = with_plain_strides(d);
    // Over long sums of rows, oneDNN's BLAS form is a fifth faster than its primitive (the head's input gradient).
    constexpr int64_t long_sum = 8192;
    if (source.columns >= long_sum && is_plain_fp32(source) && is_plain_fp32(weights) && is_plain_fp32(destination) &&
        bias.data == nullptr) {
        return dnnl::sgemm('N', 'N', d.rows, d.columns, source.columns, alpha, static_cast<const float*>(source.data),
                           source.row_stride, static_cast<const float*>(weights.data), weights.row_stride, beta,
                           static_cast<float*>(d.data), destination.row_stride) == dnnl::status::success;
    }
    const std::shared_ptr<Primitive> primitive = find_primitive(source, weights, destination, bias, alpha, beta);
    if (primitive == nullptr) return false;
    static thread_local dnnl::stream stream(cpu_engine());
    const auto memory = [](const dnnl::memory::desc& desc, void* data) {
        return dnnl::memory(desc, cpu_engine(), data);
    };
    std::unordered_map<int, dnnl::memory> arguments = {
        {DNNL_ARG_SRC, memory(primitive->source, source.data)},
        {DNNL_ARG_WEIGHTS, memory(primitive->weights, weights.data)},
        {DNNL_ARG_DST, memory(primitive->destination, destination.data)},
        {DNNL_ARG_SCRATCHPAD,
         memory(primitive->scratchpad, scratch(Scratch::primitive, primitive->scratchpad.get_size()))}};
    if (bias.data != nullptr) arguments.insert({DNNL_ARG_BIAS, memory(primitive->bias, bias.data)});
    primitive->matmul.execute(stream, arguments);
    stream.wait();
    return true;
}

// ---------------------------------------------------------------------------------------------------------------
// Passes over matrices

constexpr int64_t small = 1 << 14;  // elements; waking other threads takes longer than handling these

// to = from, converted
void copy(const Matrix& to, const Matrix& from) {
    const bool rows_outside = to.column_stride <= to.row_stride;
    const Matrix t = rows_outside ? to : to.transposed(), f = rows_outside ? from : from.transposed();
    with_type(t.data, t.type, [&](auto* target) {
        with_type(f.data, f.type, [&](auto* origin) {
#pragma omp parallel for collapse(2) if (t.batch * t.rows * t.columns > small)
            for (int64_t b = 0; b < t.batch; b++)
                for (int64_t i = 0; i < t.rows; i++) {
                    auto* target_row = target + b * t.batch_stride + i * t.row_stride;
                    const auto* origin_row = origin + b * f.batch_stride + i * f.row_stride;
                    for (int64_t j = 0; j < t.columns; j++)
                        target_row[j * t.column_stride] = float(origin_row[j * f.column_stride]);
                }
        });
    });
}

// gelu(x) = x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
constexpr float two_sqrt_2_over_pi = 1.59576912f, cubic = 0.044715f;

inline float gelu_gate(float x) { return 1.0f / (1.0f + __expf(-two_sqrt_2_over_pi * (x + cubic * x * x * x))); }
inline float gelu(float x) { return x * gelu_gate(x); }

inline float gelu_derivative(float x) {
    const float gate = gelu_gate(x);
    return gate + x * gate * (1.0f - gate) * two_sqrt_2_over_pi * (1.0f + 3.0f * cubic * x * x);
}

// x: M x N in fp32, column order, as is D. Adds the bias where `add_bias`, keeps x in AUX or scales it by gelu'(AUX),
// and writes D, which may be x itself.
void apply_epilogue(const Product& p, const Matrix& x, bool add_bias) {
    const bool gelu_forward = p.epilogue & gelu_bit, gelu_backward = p.epilogue & dgelu_bit;
    const bool keep = gelu_forward && (p.epilogue & aux_bit);
    with_type(p.d.data, p.d.type, [&](auto* d) {
        with_type(p.aux.data, p.aux.type, [&](auto* aux) {
#pragma omp parallel for if (x.rows * x.columns > small)
            for (int64_t n = 0; n < x.columns; n++) {
                float* from = static_cast<float*>(x.data) + n * x.column_stride;
                auto* to = d + n * p.d.column_stride;
                auto* aux_column = aux + n * p.aux.column_stride;
                if (add_bias)
                    for (int64_t m = 0; m < x.rows; m++) from[m] += load(p.bias.data, p.bias.type, m);
                if (keep)
                    for (int64_t m = 0; m < x.rows; m++) aux_column[m] = from[m];
                if (gelu_forward)
                    for (int64_t m = 0; m < x.rows; m++) from[m] = gelu(from[m]);
                if (gelu_backward)
                    for (int64_t m = 0; m < x.rows; m++) from[m] *= gelu_derivative(aux_column[m]);
                if (static_cast<void*>(to) != from)
                    for (int64_t m = 0; m < x.rows; m++) to[m] = from[m];
            }
        });
    });
}

// bias[i] = sum over j of m(i, j), in the order of j
void sum_rows(const Vector& bias, const Matrix& m) {
    constexpr int64_t block = 64;
    with_type(m.data, m.type, [&](auto* data) {
#pragma omp parallel for if (m.rows * m.columns > small)
        for (int64_t begin = 0; begin < m.rows; begin += block) {
            const int64_t rows = std::min(block, m.rows - begin);
            float sums[block] = {};
            const auto* origin = data + begin * m.row_stride;
            if (m.row_stride == 1) {
                for (int64_t j = 0; j < m.columns; j++)
                    for (int64_t i = 0; i < rows; i++) sums[i] += float(origin[j * m.column_stride + i]);
            } else {
                for (int64_t i = 0; i < rows; i++) {
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = 0; j < m.columns; j++)
                        sum += float(origin[i * m.row_stride + j * m.column_stride]);
                    sums[i] = sum;
                }
            }
            for (int64_t i = 0; i < rows; i++) store(bias.data, bias.type, begin + i, sums[i]);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------
// The product and its epilogue

// The matrix in fp32, in scratch memory.
Matrix widened(const Matrix& m, Scratch use) {
    Matrix wide = m;
    wide.type = Type::f32;
    wide.data = scratch(use, size_t(m.extent()) * sizeof(float));
    return wide;
}

// x = alpha a b + beta x (+ bias); x in row or column order
void multiply_into(const Matrix& x, const Matrix& a, const Matrix& b, const Vector& bias, float alpha, float beta) {
    const bool row_order = x.column_stride == 1 && (x.row_stride != 1 || x.rows == 1);
    const auto attempt = [&](const Matrix& a, const Matrix& b, const Matrix& x, const Vector& bias) {
        return row_order ? multiply(a, b, x, bias, alpha, beta)
                         : multiply(b.transposed(), a.transposed(), x.transposed(), bias, alpha, beta);
    };
    if (attempt(a, b, x, bias)) return;
    // oneDNN has no bfloat16 on CPUs without AVX-512: compute in fp32.
    const Matrix wide_a = widened(a, Scratch::a), wide_b = widened(b, Scratch::b);
    copy(wide_a, a);
    copy(wide_b, b);
    Vector wide_bias = bias;
    if (bias.data != nullptr && bias.type != Type::f32) {
        const Matrix vector = {bias.data, bias.type, x.rows, 1, 1, x.rows};
        const Matrix wide = widened(vector, Scratch::bias);
        copy(wide, vector);
        wide_bias = {wide.data, Type::f32};
    }
    if (x.type == Type::f32) {
        if (attempt(wide_a, wide_b, x, wide_bias)) return;
    } else {
        const Matrix wide_x = widened(x, Scratch::result);
        if (beta != 0.0f) copy(wide_x, x);
        if (attempt(wide_a, wide_b, wide_x, wide_bias)) return copy(x, wide_x);
    }
    throw dnnl::error(dnnl_unimplemented, "oneDNN has no matmul for these matrices");
}

void compute(const Product& p) {
    const bool broadcast = p.d.batch > 1 && (p.a.batch_stride == 0 || p.b.batch_stride == 0);
    if (p.d.batch > 1 && (broadcast || p.epilogue != CUBLASLT_EPILOGUE_DEFAULT)) {
        for (int64_t i = 0; i < p.d.batch; i++) {
            compute(
                {p.a.at(i), p.b.at(i), p.c.at(i), p.d.at(i), p.aux.at(i), p.bias.at(i), p.alpha, p.beta, p.epilogue});
        }
        return;
    }
    // Epilogues work on the unrounded result: in D where that is fp32, else in scratch memory.
    const bool gelu = p.epilogue & (gelu_bit | dgelu_bit), adds_bias = p.epilogue & bias_bit;
    const bool late_bias = adds_bias && p.alpha != 1.0f;  // oneDNN's alpha would scale the bias too
    const bool needs_pass = gelu || late_bias;
    const Matrix x = needs_pass && p.d.type != Type::f32 ? widened(p.d, Scratch::result) : p.d;
    if (p.beta != 0.0f && p.c.data != x.data) copy(x, p.c);
    multiply_into(x, p.a, p.b, adds_bias && !late_bias ? p.bias : Vector{}, p.alpha, p.beta);

    if (p.epilogue & dgelu_bit && p.epilogue & bgrad_bit) {
        Product to_x = p;
        to_x.d = x;
        apply_epilogue(to_x, x, false);
        sum_rows(p.bias, x);
        if (x.data != p.d.data) copy(p.d, x);
    } else if (needs_pass) {
        apply_epilogue(p, x, late_bias);
    }
    if (p.epilogue == CUBLASLT_EPILOGUE_BGRADA) sum_rows(p.bias, p.a);
    if (p.epilogue == CUBLASLT_EPILOGUE_BGRADB) sum_rows(p.bias, p.b.transposed());
}

// ---------------------------------------------------------------------------------------------------------------
// From cuBLASLt's descriptors to a Product

bool is_supported(uint32_t type) { return type == CUDA_R_32F || type == CUDA_R_16BF; }
Type type_of(uint32_t type) { return type == CUDA_R_32F ? Type::f32 : Type::bf16; }

Matrix matrix(const cublasLtMatrixLayout& layout, const void* data, int32_t operation) {
    const Matrix in_columns = {const_cast<void*>(data),
                               type_of(layout.type),
                               int64_t(layout.rows),
                               int64_t(layout.columns),
                               1,
                               layout.ld,
                               layout.batch_count,
                               layout.batch_count > 1 ? layout.batch_stride : 0};
    Matrix result = in_columns;
    if (layout.order == CUBLASLT_ORDER_ROW) std::swap(result.row_stride, result.column_stride);
    return operation == CUBLAS_OP_N ? result : result.transposed();
}

cublasStatus_t check_layout(const cublasLtMatrixLayout& m, const char* name) {
    if (!is_supported(m.type)) return unsupported("%s of data type %u; CUDA_R_32F and CUDA_R_16BF are", name, m.type);
    if (m.order != CUBLASLT_ORDER_COL && m.order != CUBLASLT_ORDER_ROW)
        return unsupported("%s in order %d; COL and ROW are", name, m.order);
    const uint64_t contiguous = m.order == CUBLASLT_ORDER_COL ? m.rows : m.columns;
    if (m.ld < 0 || uint64_t(m.ld) < contiguous || m.batch_count < 1) return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t check_epilogue(const cublasLtMatmulDesc& desc, const cublasLtMatrixLayout& d) {
    switch (desc.epilogue) {
        case CUBLASLT_EPILOGUE_DEFAULT: return CUBLAS_STATUS_SUCCESS;
        case CUBLASLT_EPILOGUE_BIAS:
        case CUBLASLT_EPILOGUE_GELU:
        case CUBLASLT_EPILOGUE_GELU_BIAS:
        case CUBLASLT_EPILOGUE_GELU_AUX:
        case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
        case CUBLASLT_EPILOGUE_DGELU:
        case CUBLASLT_EPILOGUE_DGELU_BGRAD:
        case CUBLASLT_EPILOGUE_BGRADA:
        case CUBLASLT_EPILOGUE_BGRADB: break;
        default: return unsupported("epilogue %u", desc.epilogue);
    }
    if (d.order != CUBLASLT_ORDER_COL) return unsupported("an epilogue with D in row order");
    if (desc.bias_type != -1 && !is_supported(uint32_t(desc.bias_type)))
        return unsupported("a bias of data type %d", desc.bias_type);
    if (desc.epilogue & aux_bit) {
        if (desc.aux_type != -1 && !is_supported(uint32_t(desc.aux_type)))
            return unsupported("an auxiliary matrix of data type %d", desc.aux_type);
        if (uint64_t(desc.aux_ld) < d.rows) return CUBLAS_STATUS_INVALID_VALUE;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t check(const cublasLtMatmulDesc& desc, const cublasLtMatrixLayout& a, const cublasLtMatrixLayout& b,
                     const cublasLtMatrixLayout& c, const cublasLtMatrixLayout& d) {
    if (desc.compute != CUBLAS_COMPUTE_32F && desc.compute != CUBLAS_COMPUTE_32F_PEDANTIC &&
        desc.compute != CUBLAS_COMPUTE_32F_FAST_16BF && desc.compute != CUBLAS_COMPUTE_32F_FAST_TF32)
        return unsupported("compute type %d; CUBLAS_COMPUTE_32F is", desc.compute);
    if (desc.scale != CUDA_R_32F) return unsupported("scale type %d; CUDA_R_32F is", desc.scale);
    if (desc.pointer_mode != CUBLASLT_POINTER_MODE_HOST) return unsupported("alpha and beta in device memory");
    const std::pair<const cublasLtMatrixLayout*, const char*> layouts[] = {{&a, "A"}, {&b, "B"}, {&c, "C"}, {&d, "D"}};
    for (const auto& [layout, name] : layouts) {
        const cublasStatus_t status = check_layout(*layout, name);
        if (status != CUBLAS_STATUS_SUCCESS) return status;
        if (layout->batch_count != d.batch_count) return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (a.type != b.type) return unsupported("A and B of different data types");
    if (c.type != d.type) return unsupported("C and D of different data types");
    if (a.type == CUDA_R_32F && d.type == CUDA_R_16BF) return unsupported("D in bf16 of A and B in fp32");
    if (c.order != d.order) return unsupported("C and D in different orders");
    if (d.batch_count > 1 && d.batch_stride == 0) return CUBLAS_STATUS_INVALID_VALUE;
    const Matrix left = matrix(a, nullptr, desc.transa), right = matrix(b, nullptr, desc.transb);
    if (left.columns != right.rows || uint64_t(left.rows) != d.rows || uint64_t(right.columns) != d.columns ||
        c.rows != d.rows || c.columns != d.columns || left.columns == 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    return check_epilogue(desc, d);
}

// What a product moves at least.
double bytes(const Product& p) {
    const auto matrix_bytes = [](const Matrix& m) { return double(m.batch * m.rows * m.columns) * size_of(m.type); };
    return matrix_bytes(p.a) + matrix_bytes(p.b) + matrix_bytes(p.d) * (p.beta == 0.0f ? 1 : 2) +
           (p.aux.data ? matrix_bytes(p.aux) : 0);
}

template <class Object>
cublasStatus_t destroy(Object* object) {
    delete object;
    return CUBLAS_STATUS_SUCCESS;
}

// Copies an attribute of exactly this size.
template <class T>
cublasStatus_t assign(T& attribute, const void* value, size_t size) {
    if (value == nullptr || size != sizeof attribute) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&attribute, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// The functions of cublasLt.h

const char* cublasGetStatusName(cublasStatus_t status) {
    constexpr std::pair<cublasStatus_t, const char*> names[] = {
        {CUBLAS_STATUS_SUCCESS, "CUBLAS_STATUS_SUCCESS"},
        {CUBLAS_STATUS_NOT_INITIALIZED, "CUBLAS_STATUS_NOT_INITIALIZED"},
        {CUBLAS_STATUS_ALLOC_FAILED, "CUBLAS_STATUS_ALLOC_FAILED"},
        {CUBLAS_STATUS_INVALID_VALUE, "CUBLAS_STATUS_INVALID_VALUE"},
        {CUBLAS_STATUS_ARCH_MISMATCH, "CUBLAS_STATUS_ARCH_MISMATCH"},
        {CUBLAS_STATUS_MAPPING_ERROR, "CUBLAS_STATUS_MAPPING_ERROR"},
        {CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED"},
        {CUBLAS_STATUS_INTERNAL_ERROR, "CUBLAS_STATUS_INTERNAL_ERROR"},
        {CUBLAS_STATUS_NOT_SUPPORTED, "CUBLAS_STATUS_NOT_SUPPORTED"},
        {CUBLAS_STATUS_LICENSE_ERROR, "CUBLAS_STATUS_LICENSE_ERROR"},
    };
    for (const auto& [value, name] : names) {
        if (value == status) return name;
    }
    return "unknown cuBLAS status";
}
const char* cublasGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }
const char* cublasLtGetStatusName(cublasStatus_t status) { return cublasGetStatusName(status); }
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }

size_t cublasLtGetVersion() { return 0; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return *handle = new cublasLtContext, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
    return *desc = new cublasLtMatmulDesc{.compute = compute, .scale = scale}, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t size) {
    if (desc == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE: return assign(desc->compute, value, size);
        case CUBLASLT_MATMUL_DESC_SCALE_TYPE: return assign(desc->scale, value, size);
        case CUBLASLT_MATMUL_DESC_POINTER_MODE: return assign(desc->pointer_mode, value, size);
        case CUBLASLT_MATMUL_DESC_TRANSA: return assign(desc->transa, value, size);
        case CUBLASLT_MATMUL_DESC_TRANSB: return assign(desc->transb, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE: return assign(desc->epilogue, value, size);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return assign(desc->bias, value, size);
        case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE: return assign(desc->bias_batch_stride, value, size);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return assign(desc->bias_type, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return assign(desc->aux, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return assign(desc->aux_ld, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE: return assign(desc->aux_batch_stride, value, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: return assign(desc->aux_type, value, size);
    }
    return unsupported("matmul attribute %d", attribute);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t ld) {
    *layout = new cublasLtMatrixLayout{.type = uint32_t(type), .rows = rows, .columns = columns, .ld = ld};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                size_t size) {
    if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE: return assign(layout->type, value, size);
        case CUBLASLT_MATRIX_LAYOUT_ORDER: return assign(layout->order, value, size);
        case CUBLASLT_MATRIX_LAYOUT_ROWS: return assign(layout->rows, value, size);
        case CUBLASLT_MATRIX_LAYOUT_COLS: return assign(layout->columns, value, size);
        case CUBLASLT_MATRIX_LAYOUT_LD: return assign(layout->ld, value, size);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return assign(layout->batch_count, value, size);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return assign(layout->batch_stride, value, size);
    }
    return unsupported("matrix layout attribute %d", attribute);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return *preference = new cublasLtMatmulPreference, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return destroy(preference); }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t, const void* value, size_t) {
    return preference != nullptr && value != nullptr ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
    if (handle == nullptr || desc == nullptr || !a || !b || !c || !d || requested < 1 || !results || !found)
        return CUBLAS_STATUS_INVALID_VALUE;
    *found = 0;
    const cublasStatus_t status = check(*desc, *a, *b, *c, *d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    const bool is_gelu = desc->epilogue & (gelu_bit | dgelu_bit);
    if ((desc->epilogue & bias_bit && !desc->bias) || (is_gelu && desc->epilogue & aux_bit && !desc->aux))
        return unsupported("a heuristic before the epilogue's pointers are set, whose alignment it would not know");
    *found = 1;
    results[0] = {.algo = {}, .workspaceSize = 0, .state = CUBLAS_STATUS_SUCCESS, .wavesCount = 1.0f, .reserved = {}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t*, void*, size_t,
                              cudaStream_t) {
    if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (desc == nullptr || !alpha || !beta || !a || !b || !d || !a_layout || !b_layout || !c_layout || !d_layout)
        return CUBLAS_STATUS_INVALID_VALUE;
    const cublasStatus_t status = check(*desc, *a_layout, *b_layout, *c_layout, *d_layout);
    if (status != CUBLAS_STATUS_SUCCESS) return status;

    Product p = {.a = matrix(*a_layout, a, desc->transa),
                 .b = matrix(*b_layout, b, desc->transb),
                 .c = matrix(*c_layout, c, CUBLAS_OP_N),
                 .d = matrix(*d_layout, d, CUBLAS_OP_N),
                 .aux = {},
                 .bias = {},
                 .alpha = *static_cast<const float*>(alpha),
                 .beta = *static_cast<const float*>(beta),
                 .epilogue = desc->epilogue};
    if (p.beta != 0.0f && c == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    if (c == d && c_layout->ld != d_layout->ld) return CUBLAS_STATUS_INVALID_VALUE;
    const bool has_aux = p.epilogue & aux_bit;
    const bool has_bias = p.epilogue & (bias_bit | bgrad_bit | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB);
    if ((has_aux && desc->aux == nullptr) || (has_bias && desc->bias == nullptr)) return CUBLAS_STATUS_INVALID_VALUE;
    if (has_aux) {
        p.aux = p.d;
        p.aux.data = desc->aux;
        p.aux.column_stride = desc->aux_ld;
        p.aux.batch_stride = desc->aux_batch_stride;
        if (desc->aux_type != -1) p.aux.type = type_of(uint32_t(desc->aux_type));
    }
    if (has_bias) {
        p.bias = {desc->bias, desc->bias_type == -1 ? p.d.type : type_of(uint32_t(desc->bias_type)),
                  desc->bias_batch_stride};
    }
    if (cpu_device::observer::product && cpu_device::observer::product(p.d.rows, p.d.columns, p.a.columns, bytes(p)))
        return CUBLAS_STATUS_SUCCESS;
    cpu_device::cpu_threads();  // oneDNN takes the number of threads from OpenMP
    try {
        compute(p);
    } catch (const dnnl::error& error) {
        fprintf(stderr, "cublasLtMatmul on the CPU: oneDNN: %s\n", error.what());
        return error.status == dnnl_out_of_memory ? CUBLAS_STATUS_ALLOC_FAILED : CUBLAS_STATUS_EXECUTION_FAILED;
    }
    return CUBLAS_STATUS_SUCCESS;
}
