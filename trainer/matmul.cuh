// Matrix products by cuBLASLt, in the columns it counts in: D (m x n) = op(A) op(B), with m the fastest index of
// memory. Plans are made once for each kind and shape of product, and kept.
#pragma once
#include <cublasLt.h>

#include <compare>
#include <map>

#include "trainer/device.cuh"

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

// What cuBLASLt must know of a product; prepared once for each kind and shape.
struct MatmulKey {
    int64_t m, n, k;
    bool transpose_a, transpose_b, accumulate, fp32_out;
    cublasLtEpilogue_t epilogue;
    auto operator<=>(const MatmulKey&) const = default;
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

    void open() {
        if (handle) return;
        CHECK_CUBLAS(cublasLtCreate(&handle));
        if (workspace_bytes > 0) CHECK_CUDA(cudaMalloc(&workspace, workspace_bytes));
    }
};
inline MatmulLibrary matmul_library;

constexpr cudaDataType_t data_type_X = is_fp32 ? CUDA_R_32F : CUDA_R_16BF;

inline MatmulPlan make_matmul_plan(const MatmulKey& key) {
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
    }
    const auto layout = [](cublasLtMatrixLayout_t* layout, cudaDataType_t type, int64_t rows, int64_t cols) {
        CHECK_CUBLAS(cublasLtMatrixLayoutCreate(layout, type, rows, cols, rows));
    };
    layout(&plan.a, data_type_X, key.transpose_a ? key.k : key.m, key.transpose_a ? key.m : key.k);
    layout(&plan.b, data_type_X, key.transpose_b ? key.n : key.k, key.transpose_b ? key.k : key.n);
    layout(&plan.d, key.fp32_out ? CUDA_R_32F : data_type_X, key.m, key.n);

    cublasLtMatmulPreference_t preference;
    CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &matmul_library.workspace_bytes, sizeof(size_t)));
    cublasLtMatmulHeuristicResult_t result = {};
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(matmul_library.handle, plan.operation, plan.a, plan.b,
                                                                 plan.d, plan.d, preference, 1, &result, &found);
    CHECK_CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
    plan.available = status == CUBLAS_STATUS_SUCCESS && found > 0;
    plan.algorithm = result.algo;
    return plan;
}

// Returns false, with nothing done, when cuBLASLt has no algorithm for an epilogue with GELU.
inline bool matmul(const Matmul& p) {
    matmul_library.open();
    MatmulKey key = {
        p.m, p.n, p.k, p.transpose_a, p.transpose_b, p.accumulate, p.d32 != nullptr, CUBLASLT_EPILOGUE_DEFAULT};
    if (p.pre_gelu) key.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    else if (p.gelu_input) key.epilogue = CUBLASLT_EPILOGUE_DGELU;
    else if (p.bias) key.epilogue = CUBLASLT_EPILOGUE_BIAS;
    auto found = matmul_library.plans.find(key);
    if (found == matmul_library.plans.end()) found = matmul_library.plans.emplace(key, make_matmul_plan(key)).first;
    const MatmulPlan& plan = found->second;
    if (!plan.available) {
        if (p.pre_gelu || p.gelu_input) return false;
        throw Error(text("cuBLASLt has no algorithm for a %s product with m = %lld, n = %lld, k = %lld", precision_name,
                         (long long)p.m, (long long)p.n, (long long)p.k));
    }
    if (p.bias) {
        CHECK_CUBLAS(
            cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias, sizeof(p.bias)));
    }
    const void* auxiliary = p.pre_gelu ? p.pre_gelu : p.gelu_input;
    if (auxiliary) {
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                                                    &auxiliary, sizeof(auxiliary)));
    }
    const float alpha = 1, beta = p.accumulate ? 1 : 0;
    void* d = p.d32 ? (void*)p.d32 : (void*)p.d;
    CHECK_CUBLAS(cublasLtMatmul(matmul_library.handle, plan.operation, &alpha, p.a, plan.a, p.b, plan.b, &beta, d,
                                plan.d, d, plan.d, &plan.algorithm, matmul_library.workspace,
                                matmul_library.workspace_bytes, main_stream));
    return true;
}
