// Matrix products by cuBLASLt, in the columns it counts in: D (m x n) = op(A) op(B), with m the fastest index of
// memory. Plans are made once for each kind, shape and alignment of a product, and kept.
#pragma once
#include <cublasLt.h>

#include <bit>
#include <compare>
#include <map>
#include <span>

#include "trainer/device.cuh"
#include "trainer/tuned_products.h"

inline void cublas_check(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) {
        throw Error(text("%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(status)));
    }
}
#define CHECK_CUBLAS(call) cublas_check((call), #call, __FILE__, __LINE__)

struct Matmul {
    floatX* d = nullptr;   // (n, m) out, in the build's precision; or
    float* d32 = nullptr;  // (n, m) out, in fp32
    const floatX* a = nullptr;
    const floatX* b = nullptr;
    int64_t m = 0, n = 0, k = 0;
    bool transpose_a = false, transpose_b = false;
    bool accumulate = false;             // d += instead of d =
    const floatX* bias = nullptr;        // (m) added to each row of d
    floatX* pre_gelu = nullptr;          // (n, m) out: d before GELU; GELU is applied to d
    const floatX* gelu_input = nullptr;  // (n, m) d is multiplied by GELU'(gelu_input)
};

// Bytes, a power of two, that an address is a multiple of: up to 256, which is all that cuBLASLt asks.
inline uint32_t alignment_of(const void* address) { return 1u << std::countr_zero((uintptr_t)address | 256); }

// What cuBLASLt must know of a product; prepared once for each kind and shape.
struct MatmulKey {
    int64_t m, n, k;
    bool transpose_a, transpose_b, accumulate, fp32_out;
    cublasLtEpilogue_t epilogue;
    uint32_t align_a, align_b, align_d;
    auto operator<=>(const MatmulKey&) const = default;

    std::string name() const {
        return text("%s m %lld n %lld k %lld %c%c%s%s epilogue %d aligned %u %u %u", precision_name, (long long)m,
                    (long long)n, (long long)k, transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N',
                    accumulate ? " +=" : "", fp32_out ? " fp32" : "", (int)epilogue, align_a, align_b, align_d);
    }
};

struct MatmulPlan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
    cublasLtMatmulAlgo_t algorithm = {};
    bool available = false;  // false: cuBLASLt has no algorithm for this epilogue here
};

struct MatmulLibrary {
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    // What NVIDIA recommends for Hopper; on the CPU oneDNN takes its own.
    size_t workspace_bytes = is_cpu ? 0 : 32 << 20;
    std::map<MatmulKey, MatmulPlan> plans;
    bool autotune = false, keeps_tuned = false;  // keeps: one rank writes the file
    TunedProducts tuned;

    void open() {
        if (handle) return;
        CHECK_CUBLAS(cublasLtCreate(&handle));
        if (workspace_bytes > 0) CHECK_CUDA(cudaMalloc(&workspace, workspace_bytes));
    }
};
inline MatmulLibrary matmul_library;

constexpr cudaDataType_t data_type_X = is_fp32 ? CUDA_R_32F : CUDA_R_16BF;

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(TunedProducts::Algorithm));

inline void run_matmul(const Matmul& p, const MatmulPlan& plan, void* d, const cublasLtMatmulAlgo_t& algorithm) {
    const float alpha = 1, beta = p.accumulate ? 1 : 0;
    CHECK_CUBLAS(cublasLtMatmul(matmul_library.handle, plan.operation, &alpha, p.a, plan.a, p.b, plan.b, &beta, d,
                                plan.d, d, plan.d, &algorithm, matmul_library.workspace, matmul_library.workspace_bytes,
                                main_stream));
}

// The fastest of the candidates, by the median of five runs each, into memory of its own: the product itself may add to
// what is there. A measurement that only differs by noise does not replace the heuristic's first choice.
inline cublasLtMatmulAlgo_t fastest(const Matmul& p, const MatmulPlan& plan,
                                    std::span<const cublasLtMatmulHeuristicResult_t> candidates) {
    constexpr int runs = 5;
    constexpr float noise = 0.98f;
    const DeviceArray<float> scratch(p.m * p.n);
    CHECK_CUDA(cudaMemsetAsync(scratch.data, 0, p.m * p.n * sizeof(float), main_stream));
    cudaEvent_t begin, end;
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    const cublasLtMatmulAlgo_t* best = nullptr;
    float best_ms = 0;
    for (const cublasLtMatmulHeuristicResult_t& candidate : candidates) {
        float ms[runs];
        for (int run = -1; run < runs; run++) {  // the first one warms up
            CHECK_CUDA(cudaEventRecord(begin, main_stream));
            run_matmul(p, plan, scratch.data, candidate.algo);
            CHECK_CUDA(cudaEventRecord(end, main_stream));
            CHECK_CUDA(cudaEventSynchronize(end));
            if (run >= 0) CHECK_CUDA(cudaEventElapsedTime(&ms[run], begin, end));
        }
        std::sort(ms, ms + runs);
        if (!best || ms[runs / 2] < best_ms * noise) best = &candidate.algo, best_ms = ms[runs / 2];
    }
    CHECK_CUDA(cudaEventDestroy(begin));
    CHECK_CUDA(cudaEventDestroy(end));
    return *best;
}

// What was measured in this run or an earlier one, else what is measured now.
inline cublasLtMatmulAlgo_t tuned_algorithm(const Matmul& p, const MatmulKey& key, const MatmulPlan& plan,
                                            std::span<const cublasLtMatmulHeuristicResult_t> candidates) {
    TunedProducts& tuned = matmul_library.tuned;
    const auto known = tuned.algorithms.find(key.name());
    if (known != tuned.algorithms.end()) return std::bit_cast<cublasLtMatmulAlgo_t>(known->second);
    const cublasLtMatmulAlgo_t best = fastest(p, plan, candidates);
    tuned.algorithms[key.name()] = std::bit_cast<TunedProducts::Algorithm>(best);
    if (matmul_library.keeps_tuned) tuned.write();
    return best;
}

// The operands that an epilogue reads or writes; each product has its own.
inline void set_epilogue_operands(const MatmulPlan& plan, const Matmul& p) {
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const void* pointer) {
        if (pointer) CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan.operation, attribute, &pointer, sizeof(pointer)));
    };
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.pre_gelu ? p.pre_gelu : p.gelu_input);
}

inline MatmulPlan make_matmul_plan(const MatmulKey& key, const Matmul& p) {
    MatmulPlan plan;
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan.operation, attribute, &value, sizeof(value)));
    };
    CHECK_CUBLAS(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, key.epilogue);
    if (key.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || key.epilogue == CUBLASLT_EPILOGUE_DGELU) {
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, key.m);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, data_type_X);
    }
    if (p.bias) set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type_X);
    set_epilogue_operands(plan, p);  // the heuristic looks at how they are aligned
    const auto layout = [](cublasLtMatrixLayout_t* layout, cudaDataType_t type, int64_t rows, int64_t cols) {
        CHECK_CUBLAS(cublasLtMatrixLayoutCreate(layout, type, rows, cols, rows));
    };
    layout(&plan.a, data_type_X, key.transpose_a ? key.k : key.m, key.transpose_a ? key.m : key.k);
    layout(&plan.b, data_type_X, key.transpose_b ? key.n : key.k, key.transpose_b ? key.k : key.n);
    layout(&plan.d, key.fp32_out ? CUDA_R_32F : data_type_X, key.m, key.n);

    cublasLtMatmulPreference_t preference;
    CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
        CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, matmul_library.workspace_bytes);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.align_a);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.align_b);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.align_d);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.align_d);
    constexpr int most_candidates = 8;
    cublasLtMatmulHeuristicResult_t results[most_candidates] = {};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(matmul_library.handle, plan.operation, plan.a, plan.b, plan.d, plan.d,
                                       preference, matmul_library.autotune ? most_candidates : 1, results, &found);
    CHECK_CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
    const auto end = std::remove_if(results, results + found, [](const cublasLtMatmulHeuristicResult_t& result) {
        return result.state != CUBLAS_STATUS_SUCCESS;
    });
    plan.available = status == CUBLAS_STATUS_SUCCESS && end > results;
    if (plan.available) {
        plan.algorithm = matmul_library.autotune ? tuned_algorithm(p, key, plan, {results, end}) : results[0].algo;
    }
    return plan;
}

// Returns false, with nothing done, when cuBLASLt has no algorithm for an epilogue with GELU.
inline bool matmul(const Matmul& p) {
    matmul_library.open();
    void* d = p.d32 ? (void*)p.d32 : (void*)p.d;
    MatmulKey key = {p.m,
                     p.n,
                     p.k,
                     p.transpose_a,
                     p.transpose_b,
                     p.accumulate,
                     p.d32 != nullptr,
                     CUBLASLT_EPILOGUE_DEFAULT,
                     alignment_of(p.a),
                     alignment_of(p.b),
                     alignment_of(d)};
    if (p.pre_gelu) key.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    else if (p.gelu_input) key.epilogue = CUBLASLT_EPILOGUE_DGELU;
    else if (p.bias) key.epilogue = CUBLASLT_EPILOGUE_BIAS;
    auto found = matmul_library.plans.find(key);
    if (found == matmul_library.plans.end()) found = matmul_library.plans.emplace(key, make_matmul_plan(key, p)).first;
    const MatmulPlan& plan = found->second;
    if (!plan.available) {
        if (p.pre_gelu || p.gelu_input) return false;
        throw Error(text("cuBLASLt has no algorithm for a %s product with m = %lld, n = %lld, k = %lld", precision_name,
                         (long long)p.m, (long long)p.n, (long long)p.k));
    }
    set_epilogue_operands(plan, p);
    run_matmul(p, plan, d, plan.algorithm);
    return true;
}
