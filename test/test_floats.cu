// Floats<n> as g++'s vectors (dev/cpu/vector_floats.h), against the definitions of trainer/floats.cuh element by
// element. The Makefile compiles this for each level of x86-64 whose vectors differ, since `make` compiles the trainer
// for the processor it runs on, which the next user's is not.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "trainer/floats.cuh"

namespace {

unsigned bits(float x) { return std::bit_cast<unsigned>(x); }
unsigned bits(__nv_bfloat16 x) { return std::bit_cast<unsigned short>(x); }

// All kinds: small and large, both signs, zeros, infinities, NaNs, numbers that are half way between two of bf16.
float some_float(std::mt19937& random) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const float special[] = {0.0f, -0.0f, infinity, -infinity, NAN, 1.00390625f, 1.01171875f, 1e-40f, 3.4e38f};
    if (random() % 4 == 0) return special[random() % std::size(special)];
    return std::ldexp((float)(int)random(), -31 + (int)(random() % 16));
}

// The last bytes before a page that must not be touched.
class EndOfPage {
  public:
    EndOfPage() : bytes_(sysconf(_SC_PAGESIZE)) {
        void* pages = mmap(nullptr, 2 * bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) throw std::bad_alloc();
        pages_ = (char*)pages;
        EXPECT_EQ(mprotect(pages_ + bytes_, bytes_, PROT_NONE), 0);
    }
    ~EndOfPage() { munmap(pages_, 2 * bytes_); }
    template <class T>
    T* last(int count) {
        return (T*)(pages_ + bytes_) - count;
    }

  private:
    size_t bytes_;
    char* pages_;
};

template <class Width>
struct OfWidth : testing::Test {
    static constexpr int n = Width::value;
    std::mt19937 random{1};
    EndOfPage page;

    Floats<n> some() {
        return Floats<n>::each([&](int) { return some_float(random); });
    }
    // A NaN's bits may differ.
    template <class Expected>
    static void expect(const Floats<n>& found, Expected expected) {
        for (int i = 0; i < n; i++) {
            const float wanted = expected(i);
            if (std::isnan(wanted)) ASSERT_TRUE(std::isnan(found[i])) << i;
            else ASSERT_EQ(bits(found[i]), bits(wanted)) << i << ": " << found[i] << ", " << wanted;
        }
    }
    template <class T>
    void loads_and_stores() {
        T* all = page.last<T>(n);
        for (int i = 0; i < n; i++) all[i] = from_float<T>(some_float(random));
        expect(load<n>(all), [&](int i) { return to_float(all[i]); });

        const Floats<n> x = some();
        store(all, x);
        for (int i = 0; i < n; i++) EXPECT_EQ(bits(all[i]), bits(from_float<T>(x[i]))) << i << ": " << x[i];

        for (int count = 0; count <= n; count += 4) {
            T* some = page.last<T>(count);
            for (int i = 0; i < count; i++) some[i] = from_float<T>((float)(i + 1));
            expect(load_first<n>(some, count), [&](int i) { return i < count ? (float)(i + 1) : 0.0f; });

            T& before = *page.last<T>(count + 1);
            before = from_float<T>(-1.0f);
            store_first(some, x, count);
            for (int i = 0; i < count; i++) EXPECT_EQ(bits(some[i]), bits(from_float<T>(x[i]))) << i << " of " << count;
            EXPECT_EQ(to_float(before), -1.0f);
            store_first(all, Floats<n>(2.0f), n);
            store_first(all, x, count);
            for (int i = count; i < n; i++) EXPECT_EQ(to_float(all[i]), 2.0f) << i << " of " << count;
        }
        expect(load_first<n>(all, n + 4), [&](int i) { return to_float(all[i]); });
    }
};

template <int n>
using Width = std::integral_constant<int, n>;
using Widths = testing::Types<Width<4>, Width<8>, Width<16>>;
TYPED_TEST_SUITE(OfWidth, Widths, );

TYPED_TEST(OfWidth, EachElementIsWorkedOnAlike) {
    constexpr int n = TestFixture::n;
    for (int trial = 0; trial < 1000; trial++) {
        const Floats<n> a = this->some(), b = this->some(), c = this->some();
        this->expect(Floats<n>(a[0]), [&](int) { return a[0]; });
        this->expect(a + b, [&](int i) { return a[i] + b[i]; });
        this->expect(a - b, [&](int i) { return a[i] - b[i]; });
        this->expect(a * b, [&](int i) { return a[i] * b[i]; });
        this->expect(a / b, [&](int i) { return a[i] / b[i]; });
        this->expect(-a, [&](int i) { return -a[i]; });
        this->expect(fma(a, b, c), [&](int i) { return std::fma(a[i], b[i], c[i]); });
        this->expect(sqrt(a), [&](int i) { return std::sqrt(a[i]); });
        this->expect(exp(a), [&](int i) { return __expf(a[i]); });
        this->expect(larger(a, b), [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
        this->expect(in_register(a), [&](int i) { return a[i]; });
        const int begin = this->random() % (n + 1), end = this->random() % (n + 1);
        this->expect(keep(a, begin, end, 5.0f), [&](int i) { return i >= begin && i < end ? a[i] : 5.0f; });
        Floats<n> sum = a, difference = a, product = a;
        this->expect(sum += b, [&](int i) { return a[i] + b[i]; });
        this->expect(difference -= b, [&](int i) { return a[i] - b[i]; });
        this->expect(product *= b, [&](int i) { return a[i] * b[i]; });
    }
}

TYPED_TEST(OfWidth, SumsAndMaximaGoByHalves) {
    constexpr int n = TestFixture::n;
    for (int trial = 0; trial < 100; trial++) {
        const auto a = Floats<n>::each([&](int) { return (float)(int)this->random() / 3; });
        float sums[n], largest = a[0];
        for (int i = 0; i < n; i++) sums[i] = a[i], largest = std::max(largest, a[i]);
        for (int half = n / 2; half; half /= 2)
            for (int i = 0; i < half; i++) sums[i] += sums[i + half];
        EXPECT_EQ(sum_of(a), sums[0]);
        EXPECT_EQ(max_of(a), largest);
    }
}

TYPED_TEST(OfWidth, ElementsChangePlaces) {
    constexpr int n = TestFixture::n;
    const Floats<n> a = this->some();
    for (int i = 0; i < n / 2; i++) {
        EXPECT_EQ(bits(evens(a)[i]), bits(a[2 * i]));
        EXPECT_EQ(bits(odds(a)[i]), bits(a[2 * i + 1]));
    }
    Floats<n> square[n];
    for (int i = 0; i < n; i++) square[i] = Floats<n>::each([&](int k) { return (float)(i * n + k); });
    transpose(square);
    for (int i = 0; i < n; i++) this->expect(square[i], [&](int k) { return (float)(k * n + i); });
}

TYPED_TEST(OfWidth, MovesFp32) { this->template loads_and_stores<float>(); }
TYPED_TEST(OfWidth, MovesBf16) { this->template loads_and_stores<__nv_bfloat16>(); }

}  // namespace
