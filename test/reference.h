// What each kernel computes, as plain loops in double precision: the witness for test_kernels.cu. Written from the
// formulas, one function a kernel, without a thought for speed.
//
// Rounding errors are relative to the sum of the terms' absolute values, which differs from the result where terms
// cancel. Where that can happen, `magnitude` stands beside the result: the same sum over absolute values.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

using Vector = std::vector<double>;

// ---------------------------------------------------------------------------------------------------------------
// Norm

struct Norm {
    Vector z, y, mean, rstd;
    Vector magnitude;  // of y: with |z| + |mean| in place of z - mean
};

// z = alpha x + f, y = scale (gain zhat + bias), zhat = (z - mean) rstd; RMSNorm has no mean. x or f may be empty.
inline Norm norm_forward(bool layer_norm, const Vector& x, double alpha, const Vector& f, const Vector& gain,
                         const Vector& bias, double scale, double eps, int64_t N, int C) {
    Norm r = {Vector(N * C), Vector(N * C), Vector(N), Vector(N), Vector(N * C)};
    for (int64_t n = 0; n < N; n++) {
        double* z = &r.z[n * C];
        double mean = 0, mean_size = 0, square = 0;
        for (int c = 0; c < C; c++) {
            z[c] = (x.empty() ? 0 : alpha * x[n * C + c]) + (f.empty() ? 0 : f[n * C + c]);
            if (layer_norm) mean += z[c] / C, mean_size += std::abs(z[c]) / C;
        }
        for (int c = 0; c < C; c++) square += (z[c] - mean) * (z[c] - mean) / C;
        const double rstd = 1 / std::sqrt(square + eps);
        for (int c = 0; c < C; c++) {
            const double terms =
                (x.empty() ? 0 : std::abs(alpha * x[n * C + c])) + (f.empty() ? 0 : std::abs(f[n * C + c]));
            const double shift = layer_norm ? bias[c] : 0;
            r.y[n * C + c] = scale * (gain[c] * (z[c] - mean) * rstd + shift);
            r.magnitude[n * C + c] =
                std::abs(scale) * (std::abs(gain[c]) * (terms + mean_size) * rstd + std::abs(shift));
        }
        r.mean[n] = mean;
        r.rstd[n] = rstd;
    }
    return r;
}

struct NormGradients {
    Vector dz, dgain, dbias;
    Vector dz_magnitude, dgain_magnitude, dbias_magnitude;
};

// Gradients of norm_forward by the chain rule, through zhat_c(z) = (z_c - mean) / sqrt(variance + eps), term by term.
inline NormGradients norm_backward(bool layer_norm, const Vector& dy, const Vector& z, const Vector& gain, double scale,
                                   double eps, int64_t N, int C) {
    NormGradients r = {Vector(N * C), Vector(C), Vector(C), Vector(N * C), Vector(C), Vector(C)};
    for (int64_t n = 0; n < N; n++) {
        const double *row = &z[n * C], *dy_row = &dy[n * C];
        double mean = 0, square = 0;
        for (int c = 0; c < C && layer_norm; c++) mean += row[c] / C;
        for (int c = 0; c < C; c++) square += (row[c] - mean) * (row[c] - mean) / C;
        const double rstd = 1 / std::sqrt(square + eps);
        // loss depends on z_c directly, through mean, and through the variance
        double drstd = 0, dmean = 0, drstd_size = 0, dmean_size = 0;
        for (int c = 0; c < C; c++) {
            const double dzhat = scale * gain[c] * dy_row[c], centered = row[c] - mean;
            drstd += dzhat * centered;
            drstd_size += std::abs(dzhat) * (std::abs(row[c]) + std::abs(mean));
            dmean -= dzhat * rstd;
            dmean_size += std::abs(dzhat) * rstd;
            r.dgain[c] += scale * dy_row[c] * centered * rstd;
            r.dgain_magnitude[c] += std::abs(scale * dy_row[c]) * (std::abs(row[c]) + std::abs(mean)) * rstd;
            r.dbias[c] += scale * dy_row[c];
            r.dbias_magnitude[c] += std::abs(scale * dy_row[c]);
        }
        const double cube = rstd * rstd * rstd;
        for (int c = 0; c < C; c++) {
            const double dzhat = scale * gain[c] * dy_row[c];
            r.dz[n * C + c] = dzhat * rstd - drstd * cube * (row[c] - mean) / C + (layer_norm ? dmean / C : 0);
            r.dz_magnitude[n * C + c] = std::abs(dzhat) * rstd +
                                        drstd_size * cube * (std::abs(row[c]) + std::abs(mean)) / C +
                                        (layer_norm ? dmean_size / C : 0);
        }
    }
    return r;
}

// ---------------------------------------------------------------------------------------------------------------
// Linear layers

// y (N, OC) = x (N, C) W (OC, C)^T + bias; bias may be empty
inline Vector linear(const Vector& x, const Vector& weight, const Vector& bias, int64_t N, int C, int OC) {
    Vector y(N * OC);
    for (int64_t n = 0; n < N; n++) {
        for (int o = 0; o < OC; o++) {
            double sum = bias.empty() ? 0 : bias[o];
            for (int c = 0; c < C; c++) sum += x[n * C + c] * weight[(int64_t)o * C + c];
            y[n * OC + o] = sum;
        }
    }
    return y;
}

// dx (N, C) = dy (N, OC) W
inline Vector linear_backward_input(const Vector& dy, const Vector& weight, int64_t N, int C, int OC) {
    Vector dx(N * C);
    for (int64_t n = 0; n < N; n++) {
        for (int o = 0; o < OC; o++) {
            for (int c = 0; c < C; c++) dx[n * C + c] += dy[n * OC + o] * weight[(int64_t)o * C + c];
        }
    }
    return dx;
}

// dW (OC, C) = dy^T x
inline Vector linear_backward_weight(const Vector& x, const Vector& dy, int64_t N, int C, int OC) {
    Vector dweight((int64_t)OC * C);
    for (int64_t n = 0; n < N; n++) {
        for (int o = 0; o < OC; o++) {
            for (int c = 0; c < C; c++) dweight[(int64_t)o * C + c] += dy[n * OC + o] * x[n * C + c];
        }
    }
    return dweight;
}

// dbias (C) = column sums of dy (N, C)
inline Vector column_sums(const Vector& dy, int64_t N, int C) {
    Vector sums(C);
    for (int64_t n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) sums[c] += dy[n * C + c];
    }
    return sums;
}

// ---------------------------------------------------------------------------------------------------------------
// Embedding and positions

// x (N, C) = wte[token] + wpe[t]; wpe may be empty
inline Vector embedding(const std::vector<int32_t>& tokens, const Vector& wte, const Vector& wpe, int64_t N, int T,
                        int C) {
    Vector x(N * C);
    for (int64_t n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) {
            x[n * C + c] = wte[(int64_t)tokens[n] * C + c] + (wpe.empty() ? 0 : wpe[n % T * C + c]);
        }
    }
    return x;
}

// dwte (V, C) and dwpe (T, C): rows of dx added where they were read
inline Vector embedding_backward(const std::vector<int32_t>& rows_read, const Vector& dx, int64_t rows, int C) {
    Vector gradient(rows * C);
    for (size_t n = 0; n < rows_read.size(); n++) {
        for (int c = 0; c < C; c++) gradient[(int64_t)rows_read[n] * C + c] += dx[n * C + c];
    }
    return gradient;
}

// Query and key heads of qkv (B T, NH + 2 NKV, HS): (x, y) = channels (i, i + HS/2), turned by t theta^(-2 i / HS)
inline Vector rope(Vector qkv, double theta, int B, int T, int NH, int NKV, int HS, double direction) {
    for (int64_t n = 0; n < (int64_t)B * T; n++) {
        for (int head = 0; head < NH + NKV; head++) {
            double* x = &qkv[(n * (NH + 2 * NKV) + head) * HS];
            for (int i = 0; i < HS / 2; i++) {
                const double angle = direction * (n % T) * std::pow(theta, -2.0 * i / HS);
                const double a = x[i], b = x[i + HS / 2];
                x[i] = a * std::cos(angle) - b * std::sin(angle);
                x[i + HS / 2] = a * std::sin(angle) + b * std::cos(angle);
            }
        }
    }
    return qkv;
}

// ---------------------------------------------------------------------------------------------------------------
// Attention: causal, from the first key that a query may see on; query head h reads key/value head h / (NH / NKV)

struct Attention {
    Vector out, lse;  // (B, T, NH, HS), (B, NH, T)
    Vector dqkv;      // (B, T, NH + 2 NKV, HS), where dout is given
    Vector out_magnitude, dqkv_magnitude;
    double largest_score = 0;  // |s|: rounding of s is a relative error of exp(s)
};

// kept: what memory makes of a number of `out` before the backward pass reads it
inline Attention attention(
    const Vector& qkv, const Vector& dout, const std::vector<int>& first_key, int B, int T, int NH, int NKV, int HS,
    double (*kept)(double) = [](double x) { return x; }) {
    const int64_t row = (int64_t)(NH + 2 * NKV) * HS, out_row = (int64_t)NH * HS;
    Attention r;
    r.out = r.out_magnitude = Vector(B * T * out_row);
    r.lse = Vector((int64_t)B * NH * T);
    if (!dout.empty()) r.dqkv = r.dqkv_magnitude = Vector(qkv.size());
    const double factor = 1 / std::sqrt((double)HS);
    Vector p(T);
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            const int64_t k_head = (int64_t)(NH + h / (NH / NKV)) * HS, v_head = k_head + (int64_t)NKV * HS;
            for (int i = 0; i < T; i++) {
                const int64_t q = (b * T + i) * row + h * HS, o = (b * T + i) * out_row + h * HS;
                const auto k = [&](int j) { return (b * T + j) * row + k_head; };
                const auto v = [&](int j) { return (b * T + j) * row + v_head; };
                const int first = first_key[b * T + i];
                double maximum = -INFINITY, sum = 0;
                for (int j = first; j <= i; j++) {
                    double s = 0, size = 0;
                    for (int d = 0; d < HS; d++) {
                        s += qkv[q + d] * qkv[k(j) + d] * factor;
                        size += std::abs(qkv[q + d] * qkv[k(j) + d]) * factor;
                    }
                    p[j] = s;
                    maximum = std::max(maximum, s);
                    r.largest_score = std::max(r.largest_score, size);
                }
                for (int j = first; j <= i; j++) sum += p[j] = std::exp(p[j] - maximum);
                for (int j = first; j <= i; j++) p[j] /= sum;
                r.lse[((int64_t)b * NH + h) * T + i] = maximum + std::log(sum);
                for (int j = first; j <= i; j++) {
                    for (int d = 0; d < HS; d++) {
                        r.out[o + d] += p[j] * qkv[v(j) + d];
                        r.out_magnitude[o + d] += p[j] * std::abs(qkv[v(j) + d]);
                    }
                }
                if (dout.empty()) continue;
                double delta = 0, delta_size = 0;  // sum over j of p_j dp_j
                for (int d = 0; d < HS; d++) {
                    delta += dout[o + d] * kept(r.out[o + d]);
                    delta_size += std::abs(dout[o + d]) * r.out_magnitude[o + d];
                }
                for (int j = first; j <= i; j++) {
                    double dp = 0, dp_size = 0;
                    for (int d = 0; d < HS; d++) {
                        dp += dout[o + d] * qkv[v(j) + d];
                        dp_size += std::abs(dout[o + d] * qkv[v(j) + d]);
                    }
                    const double ds = p[j] * (dp - delta) * factor, ds_size = p[j] * (dp_size + delta_size) * factor;
                    for (int d = 0; d < HS; d++) {
                        r.dqkv[q + d] += ds * qkv[k(j) + d];
                        r.dqkv[k(j) + d] += ds * qkv[q + d];
                        r.dqkv[v(j) + d] += p[j] * dout[o + d];
                        r.dqkv_magnitude[q + d] += ds_size * std::abs(qkv[k(j) + d]);
                        r.dqkv_magnitude[k(j) + d] += ds_size * std::abs(qkv[q + d]);
                        r.dqkv_magnitude[v(j) + d] += p[j] * std::abs(dout[o + d]);
                    }
                }
            }
        }
    }
    return r;
}

// ---------------------------------------------------------------------------------------------------------------
// MLP

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// y = silu(gate) up; gate_up (N, 2, F)
inline Vector swiglu(const Vector& gate_up, int64_t N, int F) {
    Vector y(N * F);
    for (int64_t i = 0; i < N * F; i++) {
        const double gate = gate_up[i / F * 2 * F + i % F], up = gate_up[i / F * 2 * F + F + i % F];
        y[i] = gate * sigmoid(gate) * up;
    }
    return y;
}

inline Vector swiglu_backward(const Vector& dy, const Vector& gate_up, int64_t N, int F) {
    Vector d(2 * N * F);
    for (int64_t i = 0; i < N * F; i++) {
        const int64_t g = i / F * 2 * F + i % F, u = g + F;
        const double s = sigmoid(gate_up[g]);
        d[g] = dy[i] * gate_up[u] * (s + gate_up[g] * s * (1 - s));
        d[u] = dy[i] * gate_up[g] * s;
    }
    return d;
}

constexpr double gelu_c = 0.79788456080286535588;  // sqrt(2 / pi)

inline double gelu(double x) { return x / 2 * (1 + std::tanh(gelu_c * (x + 0.044715 * x * x * x))); }

inline double gelu_slope(double x) {
    const double tanh = std::tanh(gelu_c * (x + 0.044715 * x * x * x));
    return (1 + tanh) / 2 + x / 2 * (1 - tanh * tanh) * gelu_c * (1 + 3 * 0.044715 * x * x);
}

// ---------------------------------------------------------------------------------------------------------------
// Classifier

struct Classifier {
    Vector losses, dlogits;  // (N), (N, Vp)
    Vector loss_magnitude;   // largest |logit| + |logit of the target| + 1
};

inline Classifier classifier(const Vector& logits, const std::vector<int32_t>& targets, int64_t N, int V, int Vp) {
    Classifier r = {Vector(N), Vector(N * Vp), Vector(N)};
    for (int64_t n = 0; n < N; n++) {
        if (targets[n] < 0) continue;
        const double* x = &logits[n * Vp];
        double maximum = -INFINITY, sum = 0;
        for (int i = 0; i < V; i++) maximum = std::max(maximum, x[i]);
        for (int i = 0; i < V; i++) sum += std::exp(x[i] - maximum);
        r.losses[n] = maximum + std::log(sum) - x[targets[n]];
        r.loss_magnitude[n] = std::abs(maximum) + std::abs(x[targets[n]]) + 1;
        for (int i = 0; i < V; i++) r.dlogits[n * Vp + i] = std::exp(x[i] - maximum) / sum - (i == targets[n]);
    }
    return r;
}

// ---------------------------------------------------------------------------------------------------------------
// Optimizer

// Norm of the mean gradient
inline double global_norm(const Vector& gradient_sums, double tokens) {
    double sum = 0;
    for (const double g : gradient_sums) sum += g * g;
    return std::sqrt(sum) / tokens;
}

// Update number t of one parameter with the clipped mean gradient g
inline void adamw(double& p, double& m, double& v, double g, int t, double lr, double beta1, double beta2, double eps,
                  double decay) {
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    const double m_hat = m / (1 - std::pow(beta1, t)), v_hat = v / (1 - std::pow(beta2, t));
    p -= lr * (m_hat / (std::sqrt(v_hat) + eps) + decay * p);
}

}  // namespace reference
