// The file that keeps what --autotune has measured.
#include "trainer/tuned_products.h"

#include <gtest/gtest.h>

#include "temporary_folder.h"

namespace {

TEST(TunedProducts, AreReadAsTheyWereWritten) {
    const TemporaryFolder folder;
    TunedProducts written = {.path = folder / "cache/gpu.json", .version = 130001};
    written.algorithms["bf16 1 2 3"] = {1, ~uint64_t(0), 0, 4, 5, 6, 7, uint64_t(1) << 63};
    written.write();
    TunedProducts read = {.path = written.path, .version = 130001};
    read.read();
    EXPECT_EQ(read.algorithms, written.algorithms);
    read.version = 130002;  // whose algorithms are others
    read.read();
    EXPECT_TRUE(read.algorithms.empty());
}

TEST(TunedProducts, AFileThatIsNotOursIsNoFile) {
    const TemporaryFolder folder;
    TunedProducts products = {.path = folder / "gpu.json", .version = 7};
    products.read();
    EXPECT_TRUE(products.algorithms.empty());
    for (const char* text : {"", "{", "[]", "{}", R"({"cublaslt":7})", R"({"cublaslt":7,"algorithms":{"a":"b"}})",
                             R"({"cublaslt":7,"algorithms":{"a":[1,2]}})", R"({"cublaslt":7,"algorithms":[[1]]})"}) {
        replace_file(products.path, text);
        products.algorithms["old"] = {};
        products.read();
        EXPECT_TRUE(products.algorithms.empty()) << text;
    }
}

TEST(TunedProducts, LieInTheUsersCache) {
    setenv("XDG_CACHE_HOME", "/cache", 1);
    EXPECT_EQ(tuned_products_path("NVIDIA H100/80GB"), "/cache/train_gpt/NVIDIA_H100_80GB.json");
    unsetenv("XDG_CACHE_HOME");
    setenv("HOME", "/home/me", 1);
    EXPECT_EQ(tuned_products_path("A"), "/home/me/.cache/train_gpt/A.json");
}

}  // namespace
