// NCCL's collectives on the CPU (dev/cpu/nccl.h): mpirun -np 1, 2, 4 build/test_nccl. Every rank runs every test.
#include <gtest/gtest.h>
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#include <mpi.h>
#include <nccl.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

namespace {

int rank = 0, ranks = 1;
ncclComm_t comm = nullptr;

template <class T>
constexpr ncclDataType_t type_of() {
    if constexpr (std::is_same_v<T, float>) return ncclFloat32;
    else if constexpr (std::is_same_v<T, double>) return ncclFloat64;
    else if constexpr (std::is_same_v<T, __nv_bfloat16>) return ncclBfloat16;
    else if constexpr (std::is_same_v<T, int8_t>) return ncclInt8;
    else if constexpr (std::is_same_v<T, uint8_t>) return ncclUint8;
    else if constexpr (std::is_same_v<T, int32_t>) return ncclInt32;
    else if constexpr (std::is_same_v<T, uint32_t>) return ncclUint32;
    else if constexpr (std::is_same_v<T, int64_t>) return ncclInt64;
    else return ncclUint64;
}

// Element i of rank r: small integers in a pattern, exact in every type.
template <class T>
T element(int r, size_t i) {
    return T(int((i * 7 + size_t(r) * 13) % 11) + 1);
}

template <class T>
std::vector<T> elements(int r, size_t count) {
    std::vector<T> result(count);
    for (size_t i = 0; i < count; i++) result[i] = element<T>(r, i);
    return result;
}

template <class T>
T reduced(size_t i, ncclRedOp_t op) {
    double total = double(element<T>(0, i));
    for (int r = 1; r < ranks; r++) {
        const double x = double(element<T>(r, i));
        total = op == ncclMax    ? std::max(total, x)
                : op == ncclMin  ? std::min(total, x)
                : op == ncclProd ? total * x
                                 : total + x;
    }
    if (op == ncclAvg) total = std::is_integral_v<T> ? std::floor(total / ranks) : total / ranks;
    return T(total);
}

constexpr size_t counts[] = {0, 1, 3, 1000, 4099};

template <class T>
void test_reductions() {
    for (const ncclRedOp_t op : {ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg}) {
        if (op == ncclProd && sizeof(T) < 4) continue;  // not exact
        for (const size_t count : counts) {
            SCOPED_TRACE(testing::Message() << "type " << type_of<T>() << " op " << op << " count " << count);
            std::vector<T> send = elements<T>(rank, count), out(count + 1, T(99));
            ASSERT_EQ(ncclAllReduce(send.data(), out.data(), count, type_of<T>(), op, comm, nullptr), ncclSuccess);
            for (size_t i = 0; i < count; i++) ASSERT_EQ(double(out[i]), double(reduced<T>(i, op))) << i;
            ASSERT_EQ(double(out[count]), 99);
            ASSERT_EQ(ncclAllReduce(send.data(), send.data(), count, type_of<T>(), op, comm, nullptr), ncclSuccess);
            for (size_t i = 0; i < count; i++) ASSERT_EQ(double(send[i]), double(reduced<T>(i, op))) << "in place";

            const size_t total = count * size_t(ranks), begin = count * size_t(rank);
            send = elements<T>(rank, total);
            out.assign(count + 1, T(99));
            ASSERT_EQ(ncclReduceScatter(send.data(), out.data(), count, type_of<T>(), op, comm, nullptr), ncclSuccess);
            for (size_t i = 0; i < count; i++) ASSERT_EQ(double(out[i]), double(reduced<T>(begin + i, op))) << i;
            ASSERT_EQ(double(out[count]), 99);
            ASSERT_EQ(ncclReduceScatter(send.data(), send.data() + begin, count, type_of<T>(), op, comm, nullptr),
                      ncclSuccess);
            for (size_t i = 0; i < total; i++) {
                const bool own = i >= begin && i < begin + count;
                ASSERT_EQ(double(send[i]), double(own ? reduced<T>(i, op) : element<T>(rank, i))) << "in place " << i;
            }

            for (int root = 0; root < ranks; root++) {
                send = elements<T>(rank, count);
                out.assign(count + 1, T(99));
                ASSERT_EQ(ncclReduce(send.data(), out.data(), count, type_of<T>(), op, root, comm, nullptr),
                          ncclSuccess);
                for (size_t i = 0; i < count; i++)
                    ASSERT_EQ(double(out[i]), rank == root ? double(reduced<T>(i, op)) : 99) << root;
            }
        }
    }
}

TEST(Nccl, ReductionsOfFloats) {
    test_reductions<float>();
    test_reductions<double>();
    test_reductions<__nv_bfloat16>();
}
TEST(Nccl, ReductionsOfIntegers) {
    test_reductions<int32_t>();
    test_reductions<uint32_t>();
    test_reductions<int64_t>();
    test_reductions<uint64_t>();
    test_reductions<int8_t>();
    test_reductions<uint8_t>();
}

TEST(Nccl, GatherAndBroadcast) {
    for (const size_t count : counts) {
        std::vector<float> send = elements<float>(rank, count), all(count * size_t(ranks), -1.0f);
        ASSERT_EQ(ncclAllGather(send.data(), all.data(), count, ncclFloat32, comm, nullptr), ncclSuccess);
        for (size_t i = 0; i < all.size(); i++) ASSERT_EQ(all[i], element<float>(int(i / count), i % count));
        std::fill(all.begin(), all.end(), -1.0f);
        std::copy(send.begin(), send.end(), all.begin() + long(count) * rank);
        ASSERT_EQ(ncclAllGather(all.data() + count * size_t(rank), all.data(), count, ncclFloat32, comm, nullptr),
                  ncclSuccess);
        for (size_t i = 0; i < all.size(); i++) ASSERT_EQ(all[i], element<float>(int(i / count), i % count));
        for (int root = 0; root < ranks; root++) {
            std::vector<float> out(count, -1.0f);
            ASSERT_EQ(ncclBroadcast(send.data(), out.data(), count, ncclFloat32, root, comm, nullptr), ncclSuccess);
            ASSERT_EQ(out, elements<float>(root, count));
            out = send;
            ASSERT_EQ(ncclBcast(out.data(), count, ncclFloat32, root, comm, nullptr), ncclSuccess);
            ASSERT_EQ(out, elements<float>(root, count));
        }
    }
}

// More than one piece a rank, so that the pieces' bounds are seen: 16 MiB each.
TEST(Nccl, LongMessages) {
    const size_t count = (size_t(5) << 20) + 17;
    std::vector<float> data(count * size_t(ranks)), out(count);
    for (size_t i = 0; i < data.size(); i++) data[i] = float((i * 31 + size_t(rank)) % 4093);
    const auto sum = [](size_t i) {
        float total = 0;
        for (int r = 0; r < ranks; r++) total += float((i * 31 + size_t(r)) % 4093);
        return total;
    };
    ASSERT_EQ(ncclReduceScatter(data.data(), out.data(), count, ncclFloat32, ncclSum, comm, nullptr), ncclSuccess);
    for (size_t i = 0; i < count; i++) ASSERT_EQ(out[i], sum(count * size_t(rank) + i)) << i;
    ASSERT_EQ(ncclAllReduce(data.data(), data.data(), data.size(), ncclFloat32, ncclSum, comm, nullptr), ncclSuccess);
    for (size_t i = 0; i < data.size(); i++) ASSERT_EQ(data[i], sum(i)) << i;
}

// The bits are those of a sum in the order of the ranks, on every rank: neither another order nor another precision.
TEST(Nccl, SumsInTheOrderOfTheRanks) {
    const size_t count = 5000;
    const auto value = [](int r, size_t i) {
        return std::sin(float(i * 37 + size_t(r) * 101)) * std::exp2(float((i + size_t(r) * 5) % 24));
    };
    std::vector<float> send(count), out(count);
    std::vector<__nv_bfloat16> send_half(count), out_half(count);
    for (size_t i = 0; i < count; i++) send[i] = value(rank, i), send_half[i] = value(rank, i);
    ASSERT_EQ(ncclAllReduce(send.data(), out.data(), count, ncclFloat32, ncclSum, comm, nullptr), ncclSuccess);
    ASSERT_EQ(ncclAllReduce(send_half.data(), out_half.data(), count, ncclBfloat16, ncclAvg, comm, nullptr),
              ncclSuccess);
    for (size_t i = 0; i < count; i++) {
        float sum = value(0, i), half_sum = __nv_bfloat16(value(0, i));
        for (int r = 1; r < ranks; r++) sum += value(r, i), half_sum += float(__nv_bfloat16(value(r, i)));
        ASSERT_EQ(memcmp(&out[i], &sum, sizeof sum), 0) << i;
        ASSERT_EQ(out_half[i].x, __nv_bfloat16(half_sum / float(ranks)).x) << i;
    }
}

// Around a ring, everyone sends and receives at once: outside a group that would wait for ever.
TEST(Nccl, SendAndReceiveInAGroup) {
    const size_t count = 300000;
    const std::vector<float> send = elements<float>(rank, count);
    std::vector<float> out(count, -1.0f);
    ASSERT_EQ(ncclGroupStart(), ncclSuccess);
    ASSERT_EQ(ncclSend(send.data(), count, ncclFloat32, (rank + 1) % ranks, comm, nullptr), ncclSuccess);
    ASSERT_EQ(ncclRecv(out.data(), count, ncclFloat32, (rank + ranks - 1) % ranks, comm, nullptr), ncclSuccess);
    ASSERT_EQ(ncclGroupEnd(), ncclSuccess);
    EXPECT_EQ(out, elements<float>((rank + ranks - 1) % ranks, count));
}

TEST(Nccl, CommunicatorAndErrors) {
    int value = -1;
    ncclResult_t error = ncclInternalError;
    EXPECT_EQ(ncclCommCount(comm, &value), ncclSuccess);
    EXPECT_EQ(value, ranks);
    EXPECT_EQ(ncclCommUserRank(comm, &value), ncclSuccess);
    EXPECT_EQ(value, rank);
    EXPECT_EQ(ncclCommGetAsyncError(comm, &error), ncclSuccess);
    EXPECT_EQ(error, ncclSuccess);
    testing::internal::CaptureStderr();
    ncclUniqueId id;
    ncclComm_t other = nullptr;
    EXPECT_EQ(ncclGetUniqueId(&id), ncclSuccess);
    EXPECT_EQ(ncclCommInitRank(&other, ranks + 1, id, rank), ncclInvalidArgument);
    EXPECT_EQ(ncclCommInitRank(&other, ranks, ncclUniqueId{}, rank), ncclInvalidArgument);
    float x = 0;
    EXPECT_EQ(ncclBroadcast(&x, &x, 1, ncclFloat32, ranks, comm, nullptr), ncclInvalidArgument);
    EXPECT_EQ(ncclAllReduce(&x, &x, 1, ncclDataType_t(6), ncclSum, comm, nullptr), ncclInvalidArgument);
    EXPECT_EQ(ncclAllReduce(&x, &x, 1, ncclFloat32, ncclSum, nullptr, nullptr), ncclInvalidArgument);
    EXPECT_EQ(ncclGroupEnd(), ncclInvalidUsage);
    EXPECT_NE(testing::internal::GetCapturedStderr(), "");
    EXPECT_STREQ(ncclGetErrorString(ncclInvalidArgument), "invalid argument");
}

// Rank 0 prints as usual, the others only what failed.
struct PrintFailures : testing::EmptyTestEventListener {
    void OnTestPartResult(const testing::TestPartResult& result) override {
        if (result.failed()) fprintf(stderr, "rank %d: line %d: %s\n", rank, result.line_number(), result.summary());
    }
};

}  // namespace

int main(int argc, char** argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    testing::InitGoogleTest(&argc, argv);
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    if (rank != 0) {
        delete listeners.Release(listeners.default_result_printer());
        listeners.Append(new PrintFailures);
    }

    ncclUniqueId id = {};
    if (rank == 0) ncclGetUniqueId(&id);
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (ncclCommInitRank(&comm, ranks, id, rank) != ncclSuccess) MPI_Abort(MPI_COMM_WORLD, 1);

    int failed = RUN_ALL_TESTS(), any_failed = 0;
    MPI_Allreduce(&failed, &any_failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    ncclCommDestroy(comm);
    MPI_Finalize();
    return any_failed;
}
