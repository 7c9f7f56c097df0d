// Each kernel against the loops of reference.h, over random and awkward sizes. NORM does not matter here.
//
// Tolerances. u is the unit roundoff: 2^-24 in fp32, 2^-8 in bf16. A sum of n terms, in any order, is off by about
// sqrt(n) u times the sum of the terms' absolute values, its "magnitude"; (8 + 2 sqrt(n)) u leaves room for the few
// roundings of each term and for the worst of many elements. An output kept as floatX adds one rounding of that type.
// Each element is held to that, not only the norm of a tensor.
//
// Device memory comes in exactly the size a kernel may touch, so that AddressSanitizer sees it leave; and it starts as
// NaN, so that a result that is added where it should be written shows. What accumulates starts from numbers.
#include <gtest/gtest.h>

#include <random>

#include "reference.h"
#include "temporary_folder.h"
#include "tested.h"

namespace {

using reference::Vector;

constexpr double u32 = 0x1p-24, uX = is_fp32 ? 0x1p-24 : 0x1p-8;

double sum_error(double terms) { return (8 + 2 * std::sqrt(terms)) * u32; }
double sum_error_X(double terms) { return sum_error(terms) + uX; }

template <class T>
class Device {
  public:
    explicit Device(int64_t count) : count_(count) {
        if (count == 0) return;
        CHECK_CUDA(cudaMalloc(&data_, count * sizeof(T)));
        CHECK_CUDA(cudaMemset(data_, 0xff, count * sizeof(T)));  // NaN in both formats
    }
    template <class U>
    explicit Device(const std::vector<U>& values) : Device((int64_t)values.size()) {
        std::vector<T> converted(values.size());
        for (size_t i = 0; i < values.size(); i++) {
            if constexpr (std::is_same_v<T, floatX> || std::is_same_v<T, float>)
                converted[i] = from_float<T>((float)values[i]);
            else converted[i] = values[i];
        }
        if (count_) CHECK_CUDA(cudaMemcpy(data_, converted.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(const Device&) = delete;
    ~Device() { cudaFree(data_); }

    operator T*() const { return data_; }  // null where empty
    std::vector<T> read() const {
        std::vector<T> values(count_);
        if (count_) CHECK_CUDA(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
    Vector numbers() const {
        Vector numbers;
        for (const T& value : read()) {
            if constexpr (std::is_same_v<T, floatX>) numbers.push_back(to_float(value));
            else numbers.push_back(value);
        }
        return numbers;
    }

  private:
    T* data_ = nullptr;
    int64_t count_ = 0;
};

std::mt19937 generator(1);

// Normal numbers that T can hold.
template <class T>
Vector random_numbers(int64_t count, double std = 1, double mean = 0) {
    std::normal_distribution<double> normal(mean, std);
    Vector numbers(count);
    for (double& x : numbers) x = to_float(from_float<T>((float)normal(generator)));
    return numbers;
}

std::vector<int32_t> random_tokens(int64_t count, int V) {
    std::vector<int32_t> tokens(count);
    for (int32_t& token : tokens) token = (int32_t)(generator() % V);
    return tokens;
}

Vector absolute(Vector x) {
    for (double& value : x) value = std::abs(value);
    return x;
}

Vector operator+(Vector a, const Vector& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] += b[i];
    return a;
}

Vector operator*(double factor, Vector a) {
    for (double& value : a) value *= factor;
    return a;
}

// |actual - expected| <= tolerance * magnitude, each element; NaN is never close.
void expect_close(const Vector& actual, const Vector& expected, const Vector& magnitude, double tolerance,
                  const std::string& what) {
    ASSERT_EQ(actual.size(), expected.size()) << what;
    size_t bad = 0, worst = 0;
    double worst_ratio = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double error = std::abs(actual[i] - expected[i]), bound = tolerance * magnitude[i] + 1e-37;
        if (error <= bound) continue;
        bad++;
        if (!(error / bound <= worst_ratio)) worst = i, worst_ratio = error / bound;
    }
    if (bad == 0) return;
    ADD_FAILURE() << what << ": " << bad << " of " << expected.size() << " elements off; the worst, " << worst << ": "
                  << actual[worst] << " for " << expected[worst] << ", allowed " << tolerance * magnitude[worst];
}

void expect_equal(const Vector& actual, const Vector& expected, const std::string& what) {
    expect_close(actual, expected, Vector(expected.size()), 0, what);
}

// ---------------------------------------------------------------------------------------------------------------
// Norms

struct NormCase {
    bool layer_norm;
    int64_t N;
    int C;
    double mean = 0;
};

std::vector<NormCase> norm_cases() {
    std::vector<NormCase> cases;
    for (const bool layer_norm : {false, true}) {
        for (const int C : {4, 36, 100, 132, 768, 1028})
            cases.push_back({layer_norm, 1, C}), cases.push_back({layer_norm, 13, C});
        cases.push_back({layer_norm, 301, 20});
        cases.push_back({layer_norm, 5000, 4});  // more rows than the backward kernel has groups: it goes round again
        cases.push_back({layer_norm, 3, 4096});  // a block of 8 warps a row
        cases.push_back({layer_norm, 2, 8200});  // too wide for a block's registers
        cases.push_back({layer_norm, 7, 100, 300.0});
    }
    return cases;
}

enum class NormInput { X, F, X_AND_F };

void check_norm_forward(const NormCase& c, NormInput input, double alpha, double scale, bool write_y, bool write_y32,
                        double beta = 1) {
    const std::string what = text("N %lld C %d mean %g layer_norm %d input %d alpha %g beta %g scale %g",
                                  (long long)c.N, c.C, c.mean, c.layer_norm, (int)input, alpha, beta, scale);
    const int64_t size = c.N * c.C;
    alpha = (float)alpha, beta = (float)beta, scale = (float)scale;
    const bool both = input == NormInput::X_AND_F;
    const Vector x = input == NormInput::F ? Vector() : random_numbers<float>(size, 1.5, c.mean);
    const Vector f = input == NormInput::X ? Vector() : random_numbers<floatX>(size, 0.7, both ? 0 : c.mean);
    const Vector gain = random_numbers<float>(c.C, 0.2, 1), bias = random_numbers<float>(c.layer_norm ? c.C : 0, 0.3);
    const double eps = 1e-3f;
    const Vector beta_f = beta * f;
    const reference::Norm r = reference::norm_forward(c.layer_norm, x, alpha, beta_f, gain, bias, scale, eps, c.N, c.C);

    const Device<float> dx(x), dgain(gain), dbias(bias), z(both ? size : 0), y32(write_y32 ? size : 0);
    const Device<float> mean(c.layer_norm ? c.N : 0), rstd(c.N);
    const Device<floatX> df(f), y(write_y ? size : 0);
    norm_forward({.x = dx,
                  .alpha = (float)alpha,
                  .f = df,
                  .beta = (float)beta,
                  .z = z,
                  .y = y,
                  .y32 = y32,
                  .mean = mean,
                  .rstd = rstd,
                  .gain = dgain,
                  .bias = dbias,
                  .scale = (float)scale,
                  .eps = (float)eps,
                  .N = c.N,
                  .C = c.C});

    const Vector terms = absolute(x.empty() ? Vector(size) : alpha * x) + absolute(f.empty() ? Vector(size) : beta_f);
    if (both) expect_close(z.numbers(), r.z, terms, 2 * u32, "z " + what);
    if (write_y) expect_close(y.numbers(), r.y, r.magnitude, sum_error_X(c.C), "y " + what);
    if (write_y32) expect_close(y32.numbers(), r.y, r.magnitude, sum_error(c.C), "y32 " + what);
    // The variance is relative to that of z itself: around the mean, there is nothing to cancel but z - mean.
    const double cancelled = 1 + std::abs(c.mean);
    expect_close(rstd.numbers(), r.rstd, r.rstd, cancelled * sum_error(c.C), "rstd " + what);
    if (c.layer_norm) {
        Vector row_size(c.N);
        for (int64_t i = 0; i < size; i++) row_size[i / c.C] += terms[i] / c.C;
        expect_close(mean.numbers(), r.mean, row_size, sum_error(c.C), "mean " + what);
    }
}

TEST(Norm, Forward) {
    for (const NormCase& c : norm_cases()) {
        check_norm_forward(c, NormInput::X, 1, 1, true, false);
        check_norm_forward(c, NormInput::X, 1, 0.57, true, false);
        check_norm_forward(c, NormInput::F, 1, 1, true, false);
        check_norm_forward(c, NormInput::X_AND_F, 1, 0.71, true, false);
        check_norm_forward(c, NormInput::X_AND_F, 2.3, 1, false, true);
        check_norm_forward(c, NormInput::X_AND_F, 2.3, 1, true, true);
        check_norm_forward(c, NormInput::X_AND_F, 1.2, 0.71, true, true, 0.37);
    }
    check_norm_forward({true, 5, 36}, NormInput::X, 1.7, 1, true, true);
    check_norm_forward({false, 5, 36}, NormInput::X, 1.7, 1, true, true);
}

// A row of zeros has no direction; eps keeps its norm at zero.
TEST(Norm, ZeroRow) {
    for (const bool layer_norm : {false, true}) {
        const int C = 36;
        const Device<float> x(Vector(C, 0)), gain(Vector(C, 1)), bias(Vector(layer_norm ? C : 0, 0)), mean(1), rstd(1);
        const Device<floatX> y(C);
        norm_forward(
            {.x = x, .y = y, .mean = mean, .rstd = rstd, .gain = gain, .bias = bias, .eps = 1e-6f, .N = 1, .C = C});
        expect_equal(y.numbers(), Vector(C, 0), "y");
        expect_close(rstd.numbers(), {1000}, {1000}, 8 * u32, "rstd");
    }
}

struct NormBackwardUse {
    bool dy, dy32, dres, input_f, write_dz, write_df;
    double dy_scale = 1, dres_scale = 1, scale = 1, beta = 1;
};

void check_norm_backward(const NormCase& c, const NormBackwardUse& use) {
    const std::string what = text("N %lld C %d mean %g layer_norm %d dy %d dy32 %d dres %d f %d", (long long)c.N, c.C,
                                  c.mean, c.layer_norm, use.dy, use.dy32, use.dres, use.input_f);
    const int64_t size = c.N * c.C;
    const double eps = 1e-3f, scale = (float)use.scale, dy_scale = (float)use.dy_scale,
                 dres_scale = (float)use.dres_scale;
    const Vector z = use.input_f ? random_numbers<floatX>(size, 1.5, c.mean) : random_numbers<float>(size, 1.5, c.mean);
    const Vector gain = random_numbers<float>(c.C, 0.2, 1);
    const Vector dy = random_numbers<floatX>(use.dy ? size : 0), dy32 = random_numbers<float>(use.dy32 ? size : 0);
    const Vector dres = random_numbers<float>(use.dres ? size : 0);
    Vector dy_sum(size), dy_size(size);
    if (use.dy) dy_sum = dy_sum + dy, dy_size = dy_size + absolute(dy);
    if (use.dy32) dy_sum = dy_sum + dy_scale * dy32, dy_size = dy_size + absolute(dy_scale * dy32);
    const reference::Norm forward =
        reference::norm_forward(c.layer_norm, z, 1, {}, gain, Vector(c.C), scale, eps, c.N, c.C);
    reference::NormGradients r = reference::norm_backward(c.layer_norm, dy_sum, z, gain, scale, eps, c.N, c.C);
    // Where dy and dy32 cancel, the magnitude is that of their sizes.
    const reference::NormGradients sized =
        reference::norm_backward(c.layer_norm, dy_size, z, gain, scale, eps, c.N, c.C);
    Vector magnitude = sized.dz_magnitude;
    if (use.dres) r.dz = r.dz + dres_scale * dres, magnitude = magnitude + absolute(dres_scale * dres);
    const Vector dgain_before = random_numbers<float>(c.C), dbias_before = random_numbers<float>(c.C);

    const Device<floatX> dy_device(dy), f(use.input_f ? z : Vector()), df(use.write_df ? size : 0);
    const Device<float> dy32_device(dy32), z_device(use.input_f ? Vector() : z), gain_device(gain);
    const Device<float> mean(c.layer_norm ? forward.mean : Vector()), rstd(forward.rstd), dgain(dgain_before);
    const Device<float> dbias(c.layer_norm ? dbias_before : Vector()), partial(norm_partial_size(c.C));
    const Device<float> dres_device(dres), separate(use.write_dz && !use.dres ? size : 0);
    float* dz = use.dres ? dres_device : separate;  // in place, as the trainer does
    norm_backward({.dy = dy_device,
                   .dy32 = dy32_device,
                   .dy_scale = (float)dy_scale,
                   .dres = dres_device,
                   .dres_scale = (float)dres_scale,
                   .z = z_device,
                   .f = f,
                   .mean = mean,
                   .rstd = rstd,
                   .gain = gain_device,
                   .scale = (float)scale,
                   .dz = use.write_dz ? dz : nullptr,
                   .df = df,
                   .beta = (float)use.beta,
                   .dgain = dgain,
                   .dbias = dbias,
                   .partial = partial,
                   .N = c.N,
                   .C = c.C});

    // mean and rstd come rounded: as much as the sums over the row.
    const double row_error = 2 * sum_error(c.C), column_error = 2 * sum_error((double)c.N);
    if (use.write_dz)
        expect_close((use.dres ? dres_device : separate).numbers(), r.dz, magnitude, row_error, "dz " + what);
    const double beta = (float)use.beta;
    if (use.write_df) expect_close(df.numbers(), beta * r.dz, beta * magnitude, row_error + uX, "df " + what);
    expect_close(dgain.numbers(), r.dgain + dgain_before, sized.dgain_magnitude + absolute(dgain_before), column_error,
                 "dgain " + what);
    if (c.layer_norm) {
        expect_close(dbias.numbers(), r.dbias + dbias_before, sized.dbias_magnitude + absolute(dbias_before),
                     column_error, "dbias " + what);
    }
}

TEST(Norm, Backward) {
    for (const NormCase& c : norm_cases()) {
        check_norm_backward(
            c, {.dy = true, .dy32 = false, .dres = false, .input_f = false, .write_dz = true, .write_df = true});
        check_norm_backward(c, {.dy = true,
                                .dy32 = false,
                                .dres = true,
                                .input_f = false,
                                .write_dz = true,
                                .write_df = true,
                                .dres_scale = 1.9,
                                .scale = 0.57,
                                .beta = 0.37});
        check_norm_backward(c, {.dy = true,
                                .dy32 = true,
                                .dres = false,
                                .input_f = false,
                                .write_dz = true,
                                .write_df = false,
                                .dy_scale = 1.6});
        check_norm_backward(
            c, {.dy = false, .dy32 = true, .dres = false, .input_f = true, .write_dz = false, .write_df = true});
    }
}

// The model lets dy32, dz and (in fp32) df be the same memory: the gradient of the stream, turned in place.
TEST(Norm, BackwardInPlaceOfDy32) {
    for (const NormCase& c : {NormCase{false, 13, 132}, NormCase{true, 300, 36}}) {
        const int64_t size = c.N * c.C;
        const Vector z = random_numbers<float>(size), gain = random_numbers<float>(c.C, 0.2, 1);
        const Vector dy = random_numbers<float>(size);
        const auto forward = reference::norm_forward(c.layer_norm, z, 1, {}, gain, Vector(c.C), 1, 1e-3, c.N, c.C);
        const auto r = reference::norm_backward(c.layer_norm, dy, z, gain, 1, 1e-3, c.N, c.C);
        const Device<float> stream(dy), z_device(z), gain_device(gain), mean(forward.mean), rstd(forward.rstd);
        const Device<float> dgain(Vector(c.C, 0)), dbias(Vector(c.layer_norm ? c.C : 0, 0)),
            partial(norm_partial_size(c.C));
        norm_backward({.dy32 = stream,
                       .z = z_device,
                       .mean = mean,
                       .rstd = rstd,
                       .gain = gain_device,
                       .dz = stream,
                       .dgain = dgain,
                       .dbias = dbias,
                       .partial = partial,
                       .N = c.N,
                       .C = c.C});
        expect_close(stream.numbers(), r.dz, r.dz_magnitude, 2 * sum_error(c.C), "dz");
        expect_close(dgain.numbers(), r.dgain, r.dgain_magnitude, 2 * sum_error((double)c.N), "dgain");
    }
}

// The sum where no norm computes it: alone, with f, in place, and its copy as operand.
TEST(Norm, Sum) {
    for (const int64_t count : {4, 36, 508, 512, 516, 10000}) {
        for (const bool with_f : {false, true}) {
            const Vector x = random_numbers<float>(count), f = random_numbers<floatX>(with_f ? count : 0);
            const double alpha = (float)1.7, beta = (float)0.37, gamma = (float)0.6;
            const Vector expected = with_f ? alpha * x + beta * f : alpha * x;
            const Vector size = with_f ? absolute(alpha * x) + absolute(beta * f) : absolute(alpha * x);
            const Device<float> x_device(x), sum(count), in_place(x);
            const Device<floatX> f_device(f), copy(count);
            add_up(sum, copy, (float)gamma, x_device, (float)alpha, f_device, (float)beta, count);
            add_up(in_place, nullptr, 1, in_place, (float)alpha, f_device, (float)beta, count);
            expect_close(sum.numbers(), expected, size, 2 * u32, "sum");
            expect_close(copy.numbers(), gamma * expected, gamma * size, 3 * u32 + uX, "copy");
            expect_equal(in_place.numbers(), sum.numbers(), "in place");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Linear layers

struct LinearShape {
    int64_t N;
    int C, OC;
};
constexpr LinearShape linear_shapes[] = {{1, 4, 4},    {1, 36, 108},   {13, 36, 64},
                                         {26, 16, 36}, {67, 132, 100}, {130, 64, 256}};

TEST(Linear, Forward) {
    for (const auto& [N, C, OC] : linear_shapes) {
        for (const bool biased : {false, true}) {
            const Vector x = random_numbers<floatX>(N * C), w = random_numbers<floatX>((int64_t)OC * C);
            const Vector bias = random_numbers<floatX>(biased ? OC : 0);
            const Device<floatX> dx(x), dw(w), dbias(bias), y(N * OC);
            linear_forward(y, dx, dw, dbias, N, C, OC);
            // A fused bias may meet a sum already rounded to floatX.
            expect_close(y.numbers(), reference::linear(x, w, bias, N, C, OC),
                         reference::linear(absolute(x), absolute(w), absolute(bias), N, C, OC), sum_error_X(C) + uX,
                         text("y N %lld C %d OC %d bias %d", (long long)N, C, OC, biased));
        }
    }
}

// Measuring runs a product several times; one that adds to its output must do so once.
TEST(Linear, MeasuredAlgorithmsComputeTheSame) {
    const TemporaryFolder folder;
    const int64_t N = 26;
    const int C = 16, OC = 32;
    const Device<floatX> x(random_numbers<floatX>(N * C)), dy(random_numbers<floatX>(N * OC));
    const Vector before = random_numbers<float>(OC * C);
    const auto product = [&] {
        const Device<float> dw(before);
        matmul_library.plans.clear();
        matmul({.d32 = dw, .a = x, .b = dy, .m = C, .n = OC, .k = N, .transpose_b = true, .accumulate = true});
        return dw.numbers();
    };
    const Vector expected = product();
    TunedProducts& tuned = matmul_library.tuned;
    tuned.path = folder / "gpu.json";
    matmul_library.autotune = matmul_library.keeps_tuned = true;
    const Vector measured = product();
    const auto kept = tuned.algorithms;
    tuned.read();
    EXPECT_EQ(kept.size(), 1u);
    EXPECT_EQ(tuned.algorithms, kept);
    const Vector again = product();
    matmul_library.autotune = false;
    matmul_library.plans.clear();
    if (is_cpu) expect_equal(measured, expected, "measured");  // where there is one algorithm
    const Vector one((size_t)OC * C, 1);
    expect_close(measured, expected, absolute(expected) + one, sum_error_X((double)N), "measured");
    expect_equal(again, measured, "as measured before");
}

TEST(Linear, Backward) {
    for (const auto& [N, C, OC] : linear_shapes) {
        for (const bool biased : {false, true}) {
            const std::string what = text(" N %lld C %d OC %d bias %d", (long long)N, C, OC, biased);
            const Vector x = random_numbers<floatX>(N * C), w = random_numbers<floatX>((int64_t)OC * C);
            const Vector dy = random_numbers<floatX>(N * OC);
            const Vector dw_before = random_numbers<float>((int64_t)OC * C),
                         dbias_before = random_numbers<float>(biased ? OC : 0);
            const Device<floatX> x_device(x), w_device(w), dy_device(dy), dx(N * C);
            const Device<float> dw(dw_before), dbias(dbias_before), partial(biased ? bias_partial_size(N, OC) : 0);
            linear_backward_input(dx, dy_device, w_device, N, C, OC);
            linear_backward_weight(dw, dbias, x_device, dy_device, partial, N, C, OC);
            expect_close(dx.numbers(), reference::linear_backward_input(dy, w, N, C, OC),
                         reference::linear_backward_input(absolute(dy), absolute(w), N, C, OC), sum_error_X(OC),
                         "dx" + what);
            expect_close(dw.numbers(), reference::linear_backward_weight(x, dy, N, C, OC) + dw_before,
                         reference::linear_backward_weight(absolute(x), absolute(dy), N, C, OC) + absolute(dw_before),
                         sum_error((double)N), "dw" + what);
            if (!biased) continue;
            expect_close(dbias.numbers(), reference::column_sums(dy, N, OC) + dbias_before,
                         reference::column_sums(absolute(dy), N, OC) + absolute(dbias_before), sum_error((double)N),
                         "dbias" + what);
        }
    }
}

TEST(Linear, BiasBackward) {
    for (const int C : {4, 36, 256, 260, 1028}) {
        for (const int64_t N : {1, 63, 64, 65, 200}) {
            const Vector dy = random_numbers<floatX>(N * C), before = random_numbers<float>(C);
            const Device<floatX> dy_device(dy);
            const Device<float> dbias(before), partial(bias_partial_size(N, C));
            bias_backward(dbias, dy_device, partial, N, C);
            expect_close(dbias.numbers(), reference::column_sums(dy, N, C) + before,
                         reference::column_sums(absolute(dy), N, C) + absolute(before), sum_error((double)N),
                         text("N %lld C %d", (long long)N, C));
        }
    }
}

// GELU and its slope are at most 1.13 steep, and off by a few u times (1 + |x|^3) in the tail, where exp's argument is
// rounded; but there the result is smaller than |x| exp(-x^2/2) (1 + |x|^3) <= 1.5 anyway.
Vector gelu_error(const Vector& x) {
    Vector size(x.size());
    for (size_t i = 0; i < x.size(); i++) size[i] = 2 + std::abs(x[i]);
    return size;
}

Vector each(const Vector& x, double (*function)(double)) {
    Vector y = x;
    for (double& value : y) value = function(value);
    return y;
}

TEST(Gelu, Direct) {
    for (const int64_t count : {4, 36, 512, 516, 10000}) {
        Vector x = random_numbers<floatX>(count, 2);
        x[0] = 0, x[1] = 100, x[2] = -100, x[3] = -4;
        const Vector dy = random_numbers<floatX>(count);
        const Device<floatX> x_device(x), dy_device(dy), y(count), dx(count), in_place(x), gradient_in_place(dy);
        gelu_forward(y, x_device, count);
        gelu_backward(dx, dy_device, x_device, count);
        gelu_forward(in_place, in_place, count);
        gelu_backward(gradient_in_place, gradient_in_place, x_device, count);
        Vector dx_expected = each(x, reference::gelu_slope), dx_size = gelu_error(x);
        for (int64_t i = 0; i < count; i++) dx_expected[i] *= dy[i], dx_size[i] *= std::abs(dy[i]);
        const double tolerance = 8 * u32 + uX;
        expect_close(y.numbers(), each(x, reference::gelu), gelu_error(x), tolerance, "y");
        expect_close(dx.numbers(), dx_expected, dx_size, tolerance, "dx");
        expect_equal(in_place.numbers(), y.numbers(), "y in place");
        expect_equal(gradient_in_place.numbers(), dx.numbers(), "dx in place");
    }
}

TEST(Gelu, Linear) {
    for (const auto& [N, C, OC] : linear_shapes) {
        const std::string what = text(" N %lld C %d OC %d", (long long)N, C, OC);
        const Vector x = random_numbers<floatX>(N * C), w = random_numbers<floatX>((int64_t)OC * C, 1 / std::sqrt(C));
        const Vector bias = random_numbers<floatX>(OC);
        const Device<floatX> x_device(x), w_device(w), bias_device(bias), y(N * OC), pre(N * OC);
        linear_gelu_forward(y, pre, x_device, w_device, bias_device, N, C, OC);
        const Vector pre_expected = reference::linear(x, w, bias, N, C, OC);
        const Vector pre_size = reference::linear(absolute(x), absolute(w), absolute(bias), N, C, OC);
        expect_close(pre.numbers(), pre_expected, pre_size, sum_error_X(C) + uX, "pre" + what);
        expect_close(y.numbers(), each(pre_expected, reference::gelu), pre_size + gelu_error(pre_expected),
                     1.13 * sum_error_X(C) + 2 * uX + 8 * u32, "y" + what);

        // Backwards, with the other layer's weight (OC', C') = (C, OC): dpre = (dout W2) GELU'(pre).
        const Vector dout = random_numbers<floatX>(N * C), w2 = random_numbers<floatX>((int64_t)C * OC);
        const Vector kept = pre.numbers();
        const Device<floatX> dout_device(dout), w2_device(w2), dpre(N * OC);
        linear_gelu_backward_input(dpre, dout_device, w2_device, pre, N, OC, C);
        Vector expected = reference::linear_backward_input(dout, w2, N, OC, C);
        Vector size = reference::linear_backward_input(absolute(dout), absolute(w2), N, OC, C);
        for (size_t i = 0; i < expected.size(); i++) {
            expected[i] *= reference::gelu_slope(kept[i]);
            size[i] *= 2 + std::abs(kept[i]);
        }
        expect_close(dpre.numbers(), expected, size, sum_error_X(C) + uX + 8 * u32, "dpre" + what);
    }
}

TEST(Swiglu, ForwardAndBackward) {
    for (const int64_t N : {1, 7, 65}) {
        for (const int F : {4, 32, 100, 688}) {
            const Vector gate_up = random_numbers<floatX>(2 * N * F, 2), dy = random_numbers<floatX>(N * F);
            const Device<floatX> gate_up_device(gate_up), dy_device(dy), y(N * F), d(2 * N * F);
            swiglu_forward(y, gate_up_device, N, F);
            swiglu_backward(d, dy_device, gate_up_device, N, F);
            const Vector expected = reference::swiglu(gate_up, N, F),
                         d_expected = reference::swiglu_backward(dy, gate_up, N, F);
            // exp's argument is off by |gate| u, and the bracket of silu' is a sum of terms up to 1 + |gate|.
            Vector y_size(N * F), d_size(2 * N * F);
            for (int64_t i = 0; i < N * F; i++) {
                const int64_t g = i / F * 2 * F + i % F;
                const double gate = std::abs(gate_up[g]);
                y_size[i] = (1 + gate) * std::abs(expected[i]);
                d_size[g] = std::abs(dy[i] * gate_up[g + F]) * reference::sigmoid(gate_up[g]) * (1 + gate) * (1 + gate);
                d_size[g + F] = (1 + gate) * std::abs(d_expected[g + F]);
            }
            expect_close(y.numbers(), expected, y_size, 8 * u32 + uX, "y");
            expect_close(d.numbers(), d_expected, d_size, 8 * u32 + uX, "dgate, dup");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Embedding and positions

TEST(Embedding, ForwardAndBackward) {
    for (const int C : {4, 36, 132, 1028}) {
        for (const auto& [B, T] : {std::pair(1, 1), std::pair(3, 1), std::pair(1, 13), std::pair(3, 67)}) {
            for (const bool positions : {false, true}) {
                const int V = 11, table_rows = T + 3;  // few tokens, so that they repeat
                const int64_t N = (int64_t)B * T;
                const std::vector<int32_t> tokens = random_tokens(N, V);
                const Vector wte = random_numbers<floatX>(V * C);
                const Vector wpe = positions ? random_numbers<floatX>(table_rows * C) : Vector();
                const Device<int32_t> tokens_device(tokens);
                const Device<floatX> wte_device(wte), wpe_device(wpe);
                const Device<float> x(N * C);
                embedding_forward(x, tokens_device, wte_device, wpe_device, N, T, C);
                const Vector expected = reference::embedding(tokens, wte, wpe, N, T, C);
                const Vector size = reference::embedding(tokens, absolute(wte), absolute(wpe), N, T, C);
                expect_close(x.numbers(), expected, size, u32, "x");

                const Vector dx = random_numbers<float>(N * C), wte_before = random_numbers<float>(V * C);
                const Vector wpe_before = positions ? random_numbers<float>(table_rows * C) : Vector();
                TokenRows rows;
                rows.sort(random_tokens(5, V).data(), 5);  // a batch before this one
                rows.sort(tokens.data(), N);
                const Device<float> dx_device(dx), dwte(wte_before), dwpe(wpe_before);
                const auto list = [](const auto& pinned) { return std::vector<int32_t>(pinned.begin(), pinned.end()); };
                const Device<int32_t> row_list(list(rows.rows)), starts(list(rows.starts)), ids(list(rows.tokens));
                embedding_backward(dwte, dx_device, row_list, starts, ids, (int)rows.tokens.size(), C);
                expect_close(dwte.numbers(), reference::embedding_backward(tokens, dx, V, C) + wte_before,
                             reference::embedding_backward(tokens, absolute(dx), V, C) + absolute(wte_before),
                             sum_error((double)N), "dwte");
                if (!positions) continue;
                position_backward(dwpe, dx_device, B, T, C, table_rows);
                std::vector<int32_t> position(N);
                for (int64_t n = 0; n < N; n++) position[n] = (int32_t)(n % T);
                expect_close(
                    dwpe.numbers(), reference::embedding_backward(position, dx, table_rows, C) + wpe_before,
                    reference::embedding_backward(position, absolute(dx), table_rows, C) + absolute(wpe_before),
                    sum_error(B), "dwpe");
            }
        }
    }
}

struct HeadShape {
    int B, T, NH, NKV, HS;
};

// Heads first .. first + count - 1 of each row of `heads`.
Vector cut_heads(const Vector& qkv, int heads, int first, int count, int HS) {
    Vector cut;
    for (int64_t row = 0; row < (int64_t)qkv.size() / (heads * HS); row++) {
        const auto begin = qkv.begin() + (row * heads + first) * HS;
        cut.insert(cut.end(), begin, begin + count * HS);
    }
    return cut;
}

TEST(HeadNorm, ForwardAndBackward) {
    for (const auto& [N, T, NH, NKV, HS] : {HeadShape{1, 1, 1, 1, 4}, HeadShape{67, 1, 6, 1, 12},
                                            HeadShape{913, 1, 4, 2, 52}, HeadShape{200, 1, 2, 2, 128}}) {
        const int heads = NH + 2 * NKV;
        const float eps = 1e-3f;
        const Vector z = random_numbers<floatX>((int64_t)N * heads * HS, 1.5),
                     dy = random_numbers<floatX>((int64_t)N * heads * HS);
        const Vector gains[] = {random_numbers<float>(HS, 0.2, 1), random_numbers<float>(HS, 0.2, 1)};
        const Vector before[] = {random_numbers<float>(HS), random_numbers<float>(HS)};
        const Device<float> query_gain(gains[0]), key_gain(gains[1]), dquery_gain(before[0]), dkey_gain(before[1]),
            partial(norm_partial_size(HS));
        const Device<floatX> qkv(z), dqkv(dy), kept((int64_t)N * (NH + NKV) * HS);
        const HeadNorm p = {query_gain, key_gain, eps, N, NH, NKV, HS};
        head_norm(qkv, kept, p);
        head_norm_backward(dqkv, dquery_gain, dkey_gain, kept, partial, p);
        expect_equal(kept.numbers(), cut_heads(z, heads, 0, NH + NKV, HS), "what was there");
        expect_equal(cut_heads(qkv.numbers(), heads, NH + NKV, NKV, HS), cut_heads(z, heads, NH + NKV, NKV, HS), "v");
        expect_equal(cut_heads(dqkv.numbers(), heads, NH + NKV, NKV, HS), cut_heads(dy, heads, NH + NKV, NKV, HS),
                     "dv");
        for (const bool key : {false, true}) {
            const auto own = [&, NH = NH, NKV = NKV, HS = HS](const Vector& all) {
                return cut_heads(all, heads, key ? NH : 0, key ? NKV : NH, HS);
            };
            const int64_t rows = (int64_t)N * (key ? NKV : NH);
            const std::string what = text("of %s, N %d HS %d", key ? "k" : "q", N, HS);
            const reference::Norm y =
                reference::norm_forward(false, own(z), 1, {}, gains[key], Vector(HS), 1, eps, rows, HS);
            const reference::NormGradients r =
                reference::norm_backward(false, own(dy), own(z), gains[key], 1, eps, rows, HS);
            expect_close(own(qkv.numbers()), y.y, y.magnitude, sum_error_X(HS), "y " + what);
            expect_close(own(dqkv.numbers()), r.dz, r.dz_magnitude, 2 * sum_error(HS) + uX, "dz " + what);
            expect_close((key ? dkey_gain : dquery_gain).numbers(), r.dgain + before[key],
                         r.dgain_magnitude + absolute(before[key]), 2 * sum_error((double)rows), "dgain " + what);
        }
    }
}

TEST(Rope, ForwardAndBackward) {
    for (const auto& [B, T, NH, NKV, HS] : {HeadShape{1, 1, 1, 1, 4}, HeadShape{2, 67, 6, 1, 12},
                                            HeadShape{3, 13, 8, 2, 52}, HeadShape{1, 200, 1, 1, 128}}) {
        const Vector qkv = random_numbers<floatX>((int64_t)B * T * (NH + 2 * NKV) * HS);
        const Device<float2> rotations(make_rotations(T, HS, 10000));
        for (const int direction : {1, -1}) {
            const Device<floatX> turned(qkv);
            rope(turned, rotations, B, T, NH, NKV, HS, (float)direction);
            const Vector expected = reference::rope(qkv, 10000, B, T, NH, NKV, HS, direction),
                         actual = turned.numbers();
            Vector size = absolute(qkv);  // of a pair
            for (size_t i = 0; i < size.size(); i++) {
                const size_t other = (int)i % HS < HS / 2 ? i + HS / 2 : i - HS / 2;
                size[i] = std::abs(qkv[i]) + std::abs(qkv[other]);
            }
            expect_close(actual, expected, size, 4 * u32 + uX, text("direction %d HS %d", direction, HS));
            for (int64_t row = 0; row < B * T; row++) {  // values are not turned
                for (int64_t i = (row * (NH + 2 * NKV) + NH + NKV) * HS; i < (row + 1) * (NH + 2 * NKV) * HS; i++) {
                    ASSERT_EQ(actual[i], qkv[i]);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Attention

struct AttentionOptions {
    double std = 1;        // of qkv
    double documents = 0;  // how many each row has, on average; 0: attention spans the row
    bool rotary = false;   // positions are rotated in, and out of the gradient
};

double rounded(double x) { return to_float(from_float<floatX>((float)x)); }

// The root mean square error of a tensor's part, channels from .. to - 1 of each row, is at most twice that of `ideal`,
// which was computed in double precision and rounded, plus what sums in fp32 may be off by.
void expect_twice_ideal(const Vector& actual, const Vector& ideal, const Vector& expected, const Vector& magnitude,
                        double sum_tolerance, int64_t row, int64_t from, int64_t to, const std::string& what) {
    double error = 0, ideal_error = 0, sums = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        if ((int64_t)i % row < from || (int64_t)i % row >= to) continue;
        error += std::pow(actual[i] - expected[i], 2);
        ideal_error += std::pow(rounded(ideal[i]) - expected[i], 2);
        sums += std::pow(sum_tolerance * magnitude[i], 2);
    }
    EXPECT_LE(std::sqrt(error), 2 * std::sqrt(ideal_error) + std::sqrt(sums)) << what;
}

struct AttentionInputs {
    Vector qkv, dout;
    std::vector<int> begins;  // of each token's document
    std::vector<int2> spans;  // empty without documents
};

AttentionInputs attention_inputs(const HeadShape& shape, const AttentionOptions& options) {
    const auto& [B, T, NH, NKV, HS] = shape;
    const int64_t N = (int64_t)B * T;
    AttentionInputs inputs = {random_numbers<floatX>(N * (NH + 2 * NKV) * HS, options.std),
                              random_numbers<floatX>(N * NH * HS),
                              std::vector<int>(N),
                              {}};
    for (int64_t i = 0; i < N; i++) {
        const bool starts = i % T == 0 || generator() % T < options.documents;
        inputs.begins[i] = starts ? (int)(i % T) : inputs.begins[i - 1];
    }
    inputs.spans.resize(options.documents > 0 ? N : 0);
    for (int64_t i = (int64_t)inputs.spans.size() - 1; i >= 0; i--) {
        const bool last = i % T == T - 1 || inputs.begins[i + 1] > inputs.begins[i];
        inputs.spans[i] = {inputs.begins[i], last ? (int)(i % T) + 1 : inputs.spans[i + 1].y};
    }
    return inputs;
}

struct AttentionResults {
    Vector out, lse, dqkv;
};

AttentionResults run_attention(const HeadShape& shape, const AttentionOptions& options, const AttentionInputs& inputs) {
    const auto& [B, T, NH, NKV, HS] = shape;
    const int64_t N = (int64_t)B * T;
    const Device<int2> document(inputs.spans);
    const Device<float2> rotations(options.rotary ? make_rotations(T, HS, 10000) : std::vector<float2>());
    const Device<floatX> qkv(inputs.qkv), dout(inputs.dout), out(N * NH * HS), dqkv((int64_t)inputs.qkv.size());
    const Device<float> lse(N * NH), delta(N * NH);
    attention_forward(out, lse, qkv, document, B, T, NH, NKV, HS);
    attention_backward(dqkv, delta, dout, out, lse, qkv, document, rotations, B, T, NH, NKV, HS);
    return {out.numbers(), lse.numbers(), dqkv.numbers()};
}

void check_attention(const HeadShape& shape, const AttentionOptions& options = {}) {
    const auto& [B, T, NH, NKV, HS] = shape;
    const std::string what = text(" B %d T %d NH %d NKV %d HS %d documents %g rotary %d", B, T, NH, NKV, HS,
                                  options.documents, options.rotary);
    const AttentionInputs inputs = attention_inputs(shape, options);
    reference::Attention r = reference::attention(inputs.qkv, inputs.dout, inputs.begins, B, T, NH, NKV, HS);
    const int64_t row = (int64_t)(NH + 2 * NKV) * HS;
    if (options.rotary) {
        r.dqkv = reference::rope(r.dqkv, 10000, B, T, NH, NKV, HS, -1);
        Vector& size = r.dqkv_magnitude;  // of a pair
        for (int64_t i = 0; i < (int64_t)size.size(); i++) {
            if (i % HS < HS / 2 && i % row < (NH + NKV) * HS) size[i] = size[i + HS / 2] = size[i] + size[i + HS / 2];
        }
    }
    const AttentionResults results = run_attention(shape, options, inputs);
    // An error of s is a relative error of p = exp(s - maximum) and of the sum. In bf16, tensor cores read p and ds
    // rounded, delta is made from the rounded output, and a rotation may follow a rounding: a handful of uX each.
    const double p_error = (4 + 2 * r.largest_score) * sum_error(HS) + sum_error(T) + (is_fp32 ? 0 : 4 * uX);
    expect_close(results.out, r.out, r.out_magnitude, p_error + uX, "out" + what);
    Vector lse_size = absolute(r.lse);
    for (double& size : lse_size) size += r.largest_score + 1;
    expect_close(results.lse, r.lse, lse_size, sum_error(HS) + sum_error(T), "lse" + what);
    expect_close(results.dqkv, r.dqkv, r.dqkv_magnitude,
                 2 * p_error + sum_error(HS) + sum_error(T * NH / NKV) + (2 + options.rotary) * uX, "dqkv" + what);
    // On tensor cores each tensor is held to twice the error that rounding the result in double precision makes.
    if (!tensor_cores || T < 10) return;  // of few rows, a single rounding decides
    reference::Attention ideal =
        reference::attention(inputs.qkv, inputs.dout, inputs.begins, B, T, NH, NKV, HS, rounded);
    if (options.rotary) ideal.dqkv = reference::rope(ideal.dqkv, 10000, B, T, NH, NKV, HS, -1);
    const double sums = sum_error(HS) + sum_error(T);
    expect_twice_ideal(results.out, ideal.out, r.out, r.out_magnitude, sums, 1, 0, 1, "out" + what);
    const int64_t k = NH * HS, v = k + NKV * HS;
    expect_twice_ideal(results.dqkv, ideal.dqkv, r.dqkv, r.dqkv_magnitude, sums, row, 0, k, "dq" + what);
    expect_twice_ideal(results.dqkv, ideal.dqkv, r.dqkv, r.dqkv_magnitude, sums, row, k, v, "dk" + what);
    expect_twice_ideal(results.dqkv, ideal.dqkv, r.dqkv, r.dqkv_magnitude, sums, row, v, row, "dv" + what);
}

TEST(Attention, ForwardAndBackward) {
    for (const int HS : {4, 8, 12, 32, 48, 52, 64, 80, 96, 104, 128}) {
        for (const bool rotary : {false, true}) {
            check_attention({2, 45, 2, 2, HS}, {.rotary = rotary});
            check_attention({1, 150, 2, 1, HS}, {.rotary = rotary});
            check_attention({1, 1, 1, 1, HS}, {.rotary = rotary});
        }
    }
    for (const int T : {2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 257, 300, 1100})
        check_attention({1, T, 1, 1, 32});
    check_attention({1, 1024, 1, 1, 64});
    check_attention({1, 170, 8, 2, 12});
    check_attention({3, 133, 6, 1, 52}, {.rotary = true});
    check_attention({2, 50, 3, 1, 32}, {.std = 3});  // scores of some tens: a softmax close to one-hot
}

// One query, the sequence's last, against the keys and values before it and its own.
TEST(Attention, OfOneTokenFromTheCache) {
    for (const HeadShape& shape :
         {HeadShape{1, 1, 1, 1, 4}, HeadShape{1, 70, 4, 2, 12}, HeadShape{1, 33, 2, 2, 32}, HeadShape{1, 50, 6, 1, 52},
          HeadShape{1, 40, 3, 3, 80}, HeadShape{1, 300, 4, 1, 128}}) {
        const auto& [B, T, NH, NKV, HS] = shape;
        const AttentionInputs inputs = attention_inputs(shape, {});
        const int64_t row = (NH + 2 * NKV) * HS, q = NH * HS;
        for (const int begin : {0, T / 2}) {
            std::vector<int> begins(T);
            for (int t = begin; t < T; t++) begins[t] = begin;
            const reference::Attention r = reference::attention(inputs.qkv, inputs.dout, begins, B, T, NH, NKV, HS);
            Vector cached;
            for (int t = 0; t < T; t++) {
                cached.insert(cached.end(), inputs.qkv.begin() + t * row + q, inputs.qkv.begin() + (t + 1) * row);
            }
            const Vector query(inputs.qkv.end() - row, inputs.qkv.end() - row + q);
            const Device<floatX> cache(cached), last(query), out(q);
            decode_attention(out, last, cache, begin, T, NH, NKV, HS);
            const double p_error = (4 + 2 * r.largest_score) * sum_error(HS) + 2 * sum_error(T);
            expect_close(out.numbers(), Vector(r.out.end() - q, r.out.end()),
                         Vector(r.out_magnitude.end() - q, r.out_magnitude.end()), p_error + uX,
                         text("T %d NH %d NKV %d HS %d from %d", T, NH, NKV, HS, begin));
        }
    }
}

TEST(Attention, StaysInsideDocuments) {
    for (const int HS : {4, 32, 48, 64, 80, 96, 128}) check_attention({2, 280, 2, 1, HS}, {.documents = 3});
    for (const double documents : {1e-9, 1.0, 10.0, 70.0, 1000.0}) {  // one a row, ..., one a token
        for (const int T : {1, 33, 64, 130, 300}) check_attention({2, T, 2, 2, 32}, {.documents = documents});
    }
}

// On the CPU device in three orders of threads; a GPU has its own, each time.
TEST(Attention, SameBitsEveryTime) {
    for (const int HS : {32, 52, 64, 80, 128}) {
        const HeadShape shape = {2, 150, 4, 2, HS};
        const AttentionOptions options = {.documents = 2, .rotary = true};
        const AttentionInputs inputs = attention_inputs(shape, options);
        std::vector<AttentionResults> results;
        for ([[maybe_unused]] const char* order : {"forward", "reverse", "shuffle:3"}) {
#ifndef __CUDACC__
            cpu_device::set_order(order);
#endif
            results.push_back(run_attention(shape, options, inputs));
        }
        for (const AttentionResults& r : results) {
            EXPECT_TRUE(r.out == results[0].out && r.lse == results[0].lse && r.dqkv == results[0].dqkv) << HS;
        }
    }
#ifndef __CUDACC__
    const char* usual = getenv("CPU_DEVICE_ORDER");
    cpu_device::set_order(usual ? usual : "forward");
#endif
}

TEST(Attention, FindsDocuments) {
    constexpr int start = 7;
    for (const int T : {1, 2, 31, 32, 33, 64, 100, 257}) {
        for (const int V : {8, 20, 300}) {
            const int B = 5;
            std::vector<int32_t> tokens = random_tokens(B * T, V);
            std::fill(tokens.begin(), tokens.begin() + T, start);              // documents of one token
            std::fill(tokens.begin() + T, tokens.begin() + 2 * T, start + 1);  // none starts
            const Device<int32_t> tokens_device(tokens);
            const Device<int2> document((int64_t)B * T);
            document_spans(document, tokens_device, start, B, T);
            const std::vector<int2> found = document.read();
            for (int i = 0; i < B * T; i++) {
                int begin = i % T, end = i % T + 1;
                while (begin > 0 && tokens[i / T * T + begin] != start) begin--;
                while (end < T && tokens[i / T * T + end] != start) end++;
                ASSERT_EQ(found[i].x, begin) << i << " of T " << T;
                ASSERT_EQ(found[i].y, end) << i << " of T " << T;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Classifier

void check_classifier(int64_t N, int V, double std, double mean, bool write_gradient) {
    const std::string what = text(" N %lld V %d std %g mean %g", (long long)N, V, std, mean);
    const int Vp = (int)round_up(V, 128);
    const Vector logits = random_numbers<floatX>(N * Vp, std, mean);  // padding has numbers too, not to be counted
    std::vector<int32_t> targets = random_tokens(N, V);
    targets[0] = V - 1;
    if (N > 1) targets[1] = -1, targets[N - 1] = 0;
    const reference::Classifier r = reference::classifier(logits, targets, N, V, Vp);
    const Device<floatX> x(logits);
    const Device<float> losses(N);
    const Device<int32_t> targets_device(targets);
    classifier(x, losses, targets_device, N, V, Vp, write_gradient);
    // max - x[target] is exact to u of both; the sum of exponentials has V terms.
    expect_close(losses.numbers(), r.losses, r.loss_magnitude, sum_error(V), "losses" + what);
    if (!write_gradient) return expect_equal(x.numbers(), logits, "logits" + what);
    // exp's argument is rounded: relative error u |x - max|, and p |x - max| is at most 1.
    Vector size(N * Vp);
    for (int64_t n = 0; n < N; n++) {
        for (int i = 0; i < V; i++) {
            const bool target = i == targets[n];
            const double p = std::abs(r.dlogits[n * Vp + i] + target);
            size[n * Vp + i] = targets[n] < 0 ? 0 : p * (1 + std::abs(std::log(p + 1e-30))) + target;
        }
    }
    expect_close(x.numbers(), r.dlogits, size, sum_error(V) + uX, "dlogits" + what);
}

TEST(Classifier, LossesAndGradients) {
    for (const bool write_gradient : {true, false}) {
        for (const int V : {2, 3, 61, 128, 129, 1000, 50257}) check_classifier(3, V, 2, 0, write_gradient);
        check_classifier(1, 61, 1, 0, write_gradient);
        check_classifier(40, 300, 3, 0, write_gradient);
        check_classifier(5, 1000, 1, 1e4, write_gradient);
        check_classifier(5, 1000, 1, -1e4, write_gradient);
        check_classifier(5, 1000, 1e4, 0, write_gradient);
    }
}

// Among equal logits the first counts as the largest; padding behind V does not count.
TEST(Classifier, TellsWhetherTheTargetIsLargest) {
    for (const int V : {2, 31, 1000}) {
        const int N = 40, Vp = (int)round_up(V, 128);
        Vector logits = random_numbers<floatX>((int64_t)N * Vp, 1);
        std::vector<int32_t> targets(N), expected(N);
        for (int row = 0; row < N; row++) {
            const auto begin = logits.begin() + (int64_t)row * Vp, end = begin + V;
            const auto largest = std::max_element(begin, end);
            if (row % 4 == 0) *(end - 1) = *largest;  // a tie, unless the last was the largest
            std::fill(end, begin + Vp, 100.0);
            targets[row] = row % 2 ? (int)(largest - begin) : row % 4 ? row % V : V - 1;
            expected[row] = std::max_element(begin, end) - begin == targets[row];
        }
        const Device<floatX> logits_device(logits);
        const Device<int32_t> targets_device(targets), found(N);
        target_is_largest(found, logits_device, targets_device, N, V, Vp);
        EXPECT_EQ(found.read(), expected) << "V " << V;
    }
}

TEST(Classifier, SumLosses) {
    for (const int64_t N : {1, 31, 32, 33, 1000}) {
        const Vector losses = random_numbers<float>(N, 1, 10);
        std::vector<int32_t> targets = random_tokens(N, 5);
        for (int32_t& target : targets) target -= 1;
        const Device<float> losses_device(losses);
        const Device<int32_t> targets_device(targets);
        const Device<double> sums(Vector{3, 4});
        sum_losses(sums, losses_device, targets_device, N);
        Vector expected = {3, 4};
        for (int64_t i = 0; i < N; i++) expected[0] += losses[i], expected[1] += targets[i] >= 0;
        expect_close(sums.numbers(), expected, expected, 1e-13, "sums");
        EXPECT_EQ(sums.read()[1], expected[1]);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Optimizer

TEST(Optimizer, GlobalNorm) {
    for (const int64_t count : {4, 1000, 300000}) {
        const Vector gradients = random_numbers<float>(count, 3);
        const Device<float> gradients_device(gradients);
        const Device<double> partial(square_sum_partials(count));
        square_sums(partial, gradients_device, count);
        double sum = 0;
        for (const double x : partial.read()) sum += x;
        const double norm = reference::global_norm(gradients, 1);
        EXPECT_NEAR(std::sqrt(sum), norm, sum_error(512) * norm);
    }
}

// More partial sums than the warp has lanes.
TEST(Optimizer, MeanGradientNormAndFactor) {
    for (const int partials : {1, 31, 33, 1000}) {
        const Vector squares = random_numbers<float>(partials, 1, 10);
        const Device<double> partial(squares);
        StepState state = {};
        state.sums[1] = 50;
        StepState* device = nullptr;
        CHECK_CUDA(cudaMalloc(&device, sizeof(StepState)));
        CHECK_CUDA(cudaMemcpy(device, &state, sizeof(StepState), cudaMemcpyHostToDevice));
        launch<prepare_update_kernel>(dim3(1), block_threads(256), 0, device, (const double*)(double*)partial, partials,
                                      AdamW(), 0.01f);
        CHECK_CUDA(cudaMemcpy(&state, device, sizeof(StepState), cudaMemcpyDeviceToHost));
        CHECK_CUDA(cudaFree(device));
        const double norm = std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0)) / 50;
        EXPECT_NEAR(state.gradient_norm, norm, 2 * u32 * norm);
        const double factor = std::min(1.0, 0.01 / norm) / 50;
        EXPECT_NEAR(state.factor, factor, 4 * u32 * factor);
        EXPECT_EQ(state.update, 1);
    }
}

struct Bench {
    Model model;

    Bench() {
        ModelConfig config;
        config.L = 1, config.C = 12, config.F = 20, config.NH = 3, config.NKV = 1, config.HS = 4, config.V = 7;
        plan_model(model, config, Init::NORMAL, 1, 2);
        allocate_model(model);
    }
    Vector read(const float* data) const {
        std::vector<float> values(model.table.size);
        CHECK_CUDA(cudaMemcpy(values.data(), data, values.size() * sizeof(float), cudaMemcpyDeviceToHost));
        return Vector(values.begin(), values.end());
    }
    Vector working_copy() const {
        std::vector<floatX> values(model.table.size);
        CHECK_CUDA(cudaMemcpy(values.data(), model.weights, values.size() * sizeof(floatX), cudaMemcpyDeviceToHost));
        Vector result;
        for (const floatX value : values) result.push_back(to_float(value));
        return result;
    }
    void write(float* data, const Vector& values) const {
        const std::vector<float> floats(values.begin(), values.end());
        CHECK_CUDA(cudaMemcpy(data, floats.data(), floats.size() * sizeof(float), cudaMemcpyHostToDevice));
    }
    void set_sums(double loss, double tokens) const {
        const double sums[2] = {loss, tokens};
        CHECK_CUDA(cudaMemcpy(model.state->sums, sums, sizeof(sums), cudaMemcpyHostToDevice));
    }
    StepState state() const {
        StepState state;
        CHECK_CUDA(cudaMemcpy(&state, model.state, sizeof(state), cudaMemcpyDeviceToHost));
        return state;
    }
};

Vector rounded_to_X(Vector x) {
    for (double& value : x) value = to_float(from_float<floatX>((float)value));
    return x;
}

TEST(Optimizer, AdamWOverSteps) {
    Bench bench;
    Model& model = bench.model;
    const AdamW adam = {.lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-5f, .weight_decay = 0.3f};
    const int64_t size = model.table.size;
    Vector p = random_numbers<float>(size), m(size), v(size), magnitude = absolute(p);
    bench.write(model.masters, p);
    round_weights(model);
    const float clip = 2;
    int t = 0;
    for (int step = 0; step < 6; step++) {
        const double tokens = 37 + step, scale = step % 2 ? 5 : 0.2;  // clipped at odd steps only
        Vector g = random_numbers<float>(size, scale);
        // Steps 2 and 4 have a number that is not finite: nothing may move.
        const bool skipped = step == 2 || step == 4;
        if (step == 2) g[5] = INFINITY;
        bench.write(model.gradients, g);
        bench.set_sums(step == 4 ? NAN : 100, tokens);
        const Vector p_before = bench.read(model.masters);
        update(model, adam, clip);
        const StepState state = bench.state();
        EXPECT_EQ(state.applied, skipped ? 0 : 1) << "step " << step;
        if (skipped) {
            EXPECT_EQ(state.update, t);
            expect_equal(bench.read(model.masters), p_before, "skipped");
            continue;
        }
        t++;
        const double norm = reference::global_norm(g, tokens);
        EXPECT_EQ(norm > clip, step % 2 == 1) << "the test clips as it says";
        EXPECT_NEAR(state.gradient_norm, norm, 6 * u32 * norm);
        const double factor = (norm > clip ? clip / norm : 1) / tokens;
        EXPECT_NEAR(state.factor, factor, 8 * u32 * factor);
        EXPECT_EQ(state.update, t);
        for (const Parameter& parameter : model.table.parameters) {
            for (int64_t i = parameter.offset; i < parameter.offset + parameter.padded_count(); i++) {
                reference::adamw(p[i], m[i], v[i], factor * g[i], t, adam.lr, adam.beta1, adam.beta2, adam.eps,
                                 parameter.matrix ? adam.weight_decay : 0);
            }
        }
        // Gaps between parameters belong to no range that matters: compare where parameters are.
        for (const Parameter& parameter : model.table.parameters) {
            const auto part = [&](const Vector& x) {
                return Vector(x.begin() + parameter.offset, x.begin() + parameter.offset + parameter.padded_count());
            };
            // Each step rounds p once, and moves by at most about 3 lr, off by some 30 u (factor, powers, quotient).
            Vector p_size = part(magnitude);
            for (double& x : p_size) x = t * (x + 1);
            expect_close(part(bench.read(model.masters)), part(p), p_size, 4 * u32, "p " + parameter.name);
            Vector sizes(parameter.padded_count(), 5.0 / 37 * 4);
            expect_close(part(bench.read(model.first_moment)), part(m), sizes, 16 * u32, "m " + parameter.name);
            expect_close(part(bench.read(model.second_moment)), part(v), sizes, 16 * u32, "v " + parameter.name);
        }
        if (!is_fp32) expect_equal(bench.working_copy(), rounded_to_X(bench.read(model.masters)), "working copy");
    }
    EXPECT_EQ(t, 4);
}

TEST(Optimizer, NoClippingWhereClipIsZero) {
    Bench bench;
    bench.write(bench.model.gradients, random_numbers<float>(bench.model.table.size, 1000));
    bench.write(bench.model.masters, Vector(bench.model.table.size));
    bench.set_sums(1, 8);
    update(bench.model, AdamW(), 0);
    EXPECT_EQ(bench.state().factor, 0.125f);
}

TEST(Optimizer, RoundWeights) {
    Bench bench;
    bench.write(bench.model.masters, random_numbers<float>(bench.model.table.size));
    round_weights(bench.model);
    expect_equal(bench.working_copy(), rounded_to_X(bench.read(bench.model.masters)), "weights");
}

// ---------------------------------------------------------------------------------------------------------------
// Initialization

TEST(Initialize, MomentsPaddingAndSeeds) {
    ModelConfig config;
    config.L = 2, config.C = 100, config.F = 90, config.NH = 5, config.NKV = 1, config.HS = 20, config.V = 1000;
    config.qkv_bias = true;
    const ParameterTable table = make_parameter_table(config, Init::SCALED, norm_policy(Norm::LNS));
    const auto initialized = [&](uint64_t seed) {
        const Device<float> parameters(table.size);
        initialize_parameters(parameters, table, seed);
        return parameters.read();
    };
    const std::vector<float> a = initialized(7), b = initialized(7), other = initialized(8);
    EXPECT_EQ(a, b);
    std::vector<char> used(table.size);
    for (const Parameter& p : table.parameters) {
        double sum = 0, square = 0, fourth = 0, with_other = 0;
        for (int64_t row = 0; row < p.padded_rows; row++) {
            for (int64_t col = 0; col < p.padded_cols; col++) {
                const int64_t i = p.offset + row * p.padded_cols + col;
                if (row >= p.rows || col >= p.cols) continue;
                used[i] = 1;
                sum += a[i] - p.fill;
                square += (double)a[i] * a[i];
                fourth += std::pow(a[i], 4);
                with_other += (double)a[i] * other[i];
                if (p.std == 0) {
                    ASSERT_EQ(a[i], p.fill) << p.name;
                }
            }
        }
        if (p.std == 0) continue;
        // Five standard errors of each estimate.
        const double n = (double)p.count(), s = p.std;
        EXPECT_LT(std::abs(sum / n), 5 * s / std::sqrt(n)) << p.name;
        EXPECT_NEAR(square / n, s * s, 5 * s * s * std::sqrt(2 / n)) << p.name;
        EXPECT_NEAR(fourth / n, 3 * std::pow(s, 4), 5 * std::pow(s, 4) * std::sqrt(96 / n)) << p.name;
        EXPECT_LT(std::abs(with_other / n), 5 * s * s / std::sqrt(n)) << p.name << " does not depend on the seed";
        const bool residual =
            p.name.find("o_proj") != std::string::npos || p.name.find("down_proj") != std::string::npos;
        EXPECT_FLOAT_EQ(p.std, residual ? 0.02f / std::sqrt(4.0f) : 0.02f) << p.name;
    }
    for (int64_t i = 0; i < table.size; i++) {
        if (!used[i]) {
            ASSERT_EQ(a[i], 0) << "padding at " << i;
        }
    }
}

// No two tensors start alike, not even GPT-2's query, key and value, which share a name.
TEST(Initialize, TensorsDiffer) {
    for (const Family family : {Family::LLAMA, Family::GPT2}) {
        ModelConfig config;
        config.family = family;
        config.tied = family == Family::GPT2;
        const ParameterTable table = make_parameter_table(config, Init::NORMAL, norm_policy(Norm::LNS));
        const Device<float> parameters(table.size);
        initialize_parameters(parameters, table, 7);
        const std::vector<float> values = parameters.read();
        for (const Parameter& p : table.parameters) {
            for (const Parameter& q : table.parameters) {
                if (&p == &q || p.std == 0 || q.std == 0) continue;
                ASSERT_NE(values[p.offset], values[q.offset]) << p.name << " " << q.name;
            }
        }
    }
}

// Xavier-normal: gain (8 L)^(-1/4) sqrt(2 / (in + out)), query and key with gain 1; the tables outside the blocks 0.02.
TEST(Initialize, DeepNorm) {
    ModelConfig config;
    config.L = 2, config.C = 64, config.F = 176, config.NH = 4, config.NKV = 2, config.HS = 16, config.V = 1000;
    const ParameterTable table = make_parameter_table(config, Init::NORMAL, norm_policy(Norm::DEEPNORM));
    const std::map<std::string, double> expected = {
        {"self_attn.q_proj", std::sqrt(2.0 / (64 + 64))},       {"self_attn.k_proj", std::sqrt(2.0 / (64 + 32))},
        {"self_attn.v_proj", 0.5 * std::sqrt(2.0 / (64 + 32))}, {"self_attn.o_proj", 0.5 * std::sqrt(2.0 / (64 + 64))},
        {"mlp.gate_proj", 0.5 * std::sqrt(2.0 / (64 + 176))},   {"mlp.up_proj", 0.5 * std::sqrt(2.0 / (64 + 176))},
        {"mlp.down_proj", 0.5 * std::sqrt(2.0 / (64 + 176))}};
    int matrices = 0;
    for (const Parameter& p : table.parameters) {
        if (!p.matrix) continue;
        double std = 0.02;
        for (const auto& [name, value] : expected) {
            if (p.name.find(name) != std::string::npos) std = value, matrices++;
        }
        EXPECT_NEAR(p.std, std, 1e-6 * std) << p.name;
    }
    EXPECT_EQ(matrices, 2 * 7);
}

// What is stored under which name belongs to the contract with Hugging Face and with older checkpoints.
TEST(Policy, NamesOfNorms) {
    const auto norm_names_of = [](Norm norm, Family family) {
        ModelConfig config;
        config.family = family, config.L = 4;
        std::string names;
        for (const Parameter& p : make_parameter_table(config, Init::NORMAL, norm_policy(norm)).parameters) {
            const bool first = p.name.find(".0.") != std::string::npos, last = p.name.find(".3.") != std::string::npos;
            if (p.matrix || (!first && !last) || p.name.find(".bias") != std::string::npos) continue;
            names += (names.empty() ? "" : " ") + p.name.substr(p.name.find('.') + 1);
        }
        return names;
    };
    const auto blocks = [](const std::string& stem, const std::vector<std::string>& first,
                           const std::vector<std::string>& last) {
        std::string names;
        for (const std::string& name : first) names += (names.empty() ? "" : " ") + stem + ".0." + name + ".weight";
        for (const std::string& name : last) names += " " + stem + ".3." + name + ".weight";
        return names;
    };
    const std::vector<std::string> llama = {"input_layernorm", "post_attention_layernorm"}, gpt2 = {"ln_1", "ln_2"};
    const std::vector<std::string> post = {"post_attention_layernorm", "post_feedforward_layernorm"};
    const std::vector<std::string> peri = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                                           "post_feedforward_layernorm"};
    for (const Norm norm : {Norm::PRE, Norm::LNS, Norm::LNS_INIT, Norm::RES_SQRT, Norm::PRORES}) {
        EXPECT_EQ(norm_names_of(norm, Family::LLAMA), blocks("layers", llama, llama));
        EXPECT_EQ(norm_names_of(norm, Family::GPT2), blocks("h", gpt2, gpt2));
    }
    for (const Norm norm : {Norm::POST, Norm::DEEPNORM, Norm::REORDERED}) {
        EXPECT_EQ(norm_names_of(norm, Family::LLAMA), blocks("layers", post, post));
    }
    EXPECT_EQ(norm_names_of(Norm::MIX, Family::LLAMA), blocks("layers", post, llama));
    EXPECT_EQ(norm_names_of(Norm::MIX, Family::GPT2), blocks("h", post, gpt2));
    EXPECT_EQ(norm_names_of(Norm::KEEL, Family::LLAMA), blocks("layers", llama, peri));
    EXPECT_EQ(norm_names_of(Norm::KEEL, Family::GPT2), blocks("h", gpt2, peri));
    EXPECT_EQ(norm_names_of(Norm::PERI, Family::LLAMA), blocks("layers", peri, peri));
    EXPECT_EQ(norm_names_of(Norm::PERI, Family::GPT2), blocks("h", peri, peri));
}

// The same numbers whatever the padding: a tensor's values depend on its name, its shape and the seed.
TEST(Initialize, IndependentOfPadding) {
    Parameter plain = {.name = "w", .rows = 5, .cols = 9, .padded_rows = 5, .padded_cols = 9, .std = 1};
    Parameter padded = plain;
    padded.padded_rows = 8, padded.padded_cols = 16;
    const auto initialized = [](const Parameter& p) {
        ParameterTable table;
        table.parameters = {p};
        table.size = p.padded_count();
        const Device<float> values(table.size);
        initialize_parameters(values, table, 3);
        return values.read();
    };
    const std::vector<float> a = initialized(plain), b = initialized(padded);
    for (int row = 0; row < 8; row++) {
        for (int col = 0; col < 16; col++) {
            EXPECT_EQ(b[row * 16 + col], row < 5 && col < 9 ? a[row * 9 + col] : 0.0f);
        }
    }
}

}  // namespace
