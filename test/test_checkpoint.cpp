// Tensor files and checkpoint folders: what is written comes back, what is damaged is told, and a kill at any moment
// leaves a whole checkpoint.
#include "trainer/checkpoint.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>

#include <cmath>
#include <fstream>
#include <functional>
#include <random>
#include <thread>

#include "temporary_folder.h"

namespace {

namespace fs = std::filesystem;

struct Checkpoint : testing::Test {
    const TemporaryFolder temporary;
    const fs::path& folder = temporary.path;

    std::string path(const std::string& name) const { return folder / name; }

    std::string raw_file(const std::string& name, const std::string& contents) const {
        std::ofstream(path(name), std::ios::binary) << contents;
        return path(name);
    }

    // A tensor file put together by hand.
    std::string tensor_file(const std::string& name, const std::string& header, size_t data_bytes) const {
        const uint64_t length = header.size();
        return raw_file(
            name, std::string(reinterpret_cast<const char*>(&length), 8) + header + std::string(data_bytes, '\1'));
    }
};

struct SafetensorsFile : Checkpoint {};
struct CheckpointFolders : Checkpoint {};

// The message of the error that `action` must end with: one line, and a runtime_error.
std::string error_of(const std::function<void()>& action) {
    try {
        action();
    } catch (const std::runtime_error& error) {
        const std::string message = error.what();
        EXPECT_EQ(message.find('\n'), std::string::npos) << message;
        return message;
    }
    ADD_FAILURE() << "no error";
    return "";
}

void expect_mentions(const std::string& message, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
        EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
}

int64_t count(const TensorSpec& spec) {
    int64_t product = 1;
    for (const int64_t dimension : spec.shape) product *= dimension;
    return product;
}

const std::map<std::string, int> widths = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
    {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8},
};

std::vector<char> random_bytes(size_t size, int seed) {
    std::mt19937 random(seed);
    std::vector<char> bytes(size);
    for (char& byte : bytes) byte = static_cast<char>(random());
    return bytes;
}

void write_tensors(const std::string& path, const std::vector<TensorSpec>& specs, const std::vector<char>& data) {
    SafetensorsWriter writer(path, specs);
    writer.write(data.data(), data.size());
    writer.close();
}

template <class T>
void write_tensor(const std::string& path, const TensorSpec& spec, const std::vector<T>& values) {
    SafetensorsWriter writer(path, {spec});
    writer.write(values.data(), values.size() * sizeof(T));
    writer.close();
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors

TEST_F(SafetensorsFile, BringsBackEveryTypeAndShapeWhateverThePieces) {
    std::vector<TensorSpec> specs;
    for (const auto& [dtype, width] : widths) {
        for (const std::vector<int64_t>& shape :
             std::vector<std::vector<int64_t>>{{}, {1}, {7}, {0}, {3, 0}, {0, 3}, {3, 5}, {2, 3, 4, 5}}) {
            specs.push_back({"z" + std::to_string(100 - specs.size()) + "." + dtype, dtype, shape});
        }
    }
    size_t total = 0;
    for (const TensorSpec& spec : specs) total += count(spec) * widths.at(spec.dtype);
    const std::vector<char> data = random_bytes(total, 1);

    for (const size_t piece : {size_t{1}, size_t{13}, total}) {
        SafetensorsWriter writer(path("t"), specs, {{"norm", "LNS"}, {"text", "a \"quote\"\n\xc3\xa9"}});
        for (size_t at = 0; at < total; at += piece) writer.write(data.data() + at, std::min(piece, total - at));
        writer.close();

        const SafetensorsReader reader(path("t"));
        EXPECT_EQ(reader.metadata(), (std::map<std::string, std::string>{
                                         {"format", "pt"}, {"norm", "LNS"}, {"text", "a \"quote\"\n\xc3\xa9"}}));
        ASSERT_EQ(reader.names().size(), specs.size());
        auto at = data.begin();
        for (const TensorSpec& spec : specs) {
            const auto end = at + count(spec) * widths.at(spec.dtype);
            ASSERT_TRUE(reader.has(spec.name));
            EXPECT_EQ(reader.spec(spec.name).dtype, spec.dtype);
            EXPECT_EQ(reader.spec(spec.name).shape, spec.shape);
            EXPECT_EQ(reader.read_bytes(spec.name), std::vector<char>(at, end));
            at = end;
        }
    }
}

TEST_F(SafetensorsFile, LiesOnDiskAsTheFormatSays) {
    SafetensorsWriter writer(path("t"), {{"b", "F32", {1, 2}}, {"a", "BF16", {}}});
    writer.write("12345678AB", 10);
    writer.close();
    const std::string contents = read_file(path("t"));
    uint64_t length = 0;
    std::memcpy(&length, contents.data(), 8);
    EXPECT_EQ(length % 8, 0u);
    EXPECT_EQ(contents[8], '{');
    EXPECT_EQ(contents.substr(8 + length), "12345678AB");
    EXPECT_EQ(nlohmann::json::parse(contents.substr(8, length)), nlohmann::json::parse(R"({
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "a": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}})"));
}

TEST_F(SafetensorsFile, ReadsAFileWithoutMetadataInAnyOrder) {
    const std::string file = tensor_file("t", R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},
        "a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "none":{"dtype":"F32","shape":[0],"data_offsets":[1,1]}}  )",
                                         3);
    const SafetensorsReader reader(file);
    EXPECT_EQ(reader.names(), (std::vector<std::string>{"a", "b", "none"}));
    EXPECT_TRUE(reader.metadata().empty());
    EXPECT_TRUE(reader.read("none").empty());
    EXPECT_EQ(reader.read_bytes("b"), (std::vector<char>{1, 1}));
}

// What IEEE 754 says that the 16 bits mean.
double half_value(int bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

TEST_F(SafetensorsFile, ConvertsEveryHalf) {
    std::vector<uint16_t> bits(65536);
    for (int i = 0; i < 65536; i++) bits[i] = static_cast<uint16_t>(i);
    write_tensor(path("t"), {"x", "F16", {65536}}, bits);
    const std::vector<float> values = SafetensorsReader(path("t")).read("x");
    ASSERT_EQ(values.size(), bits.size());
    for (int i = 0; i < 65536; i++) {
        const double expected = half_value(i);
        if (std::isnan(expected)) ASSERT_TRUE(std::isnan(values[i])) << i;
        else ASSERT_EQ(values[i], expected) << i;
        ASSERT_EQ(std::signbit(values[i]), i >= 0x8000) << i;
    }
}

TEST_F(SafetensorsFile, ConvertsTheOtherFloats) {
    write_tensor(path("t"), {"x", "BF16", {6}}, std::vector<uint16_t>{0x3f80, 0xc049, 0x0001, 0x8000, 0x7f80, 0x7fc0});
    std::vector<float> values = SafetensorsReader(path("t")).read("x");
    EXPECT_EQ(std::vector<float>(values.begin(), values.end() - 1),
              (std::vector<float>{1.0f, -3.140625f, 0x1p-133f, -0.0f, INFINITY}));
    EXPECT_TRUE(std::signbit(values[3]) && std::isnan(values[5]));

    write_tensor(path("t"), {"x", "F64", {3}}, std::vector<double>{1.0 / 3, -1e-300, 7});
    EXPECT_EQ(SafetensorsReader(path("t")).read("x"), (std::vector<float>{1.0f / 3, -0.0f, 7}));

    write_tensor(path("t"), {"x", "F32", {3}}, std::vector<float>{0.1f, -1e-45f, 3e38f});
    EXPECT_EQ(SafetensorsReader(path("t")).read("x"), (std::vector<float>{0.1f, -1e-45f, 3e38f}));
}

TEST_F(SafetensorsFile, ReadsRows) {
    constexpr int64_t rows = 3001, width = 701;  // several of the reader's pieces
    std::vector<float> values(rows * width);
    for (size_t i = 0; i < values.size(); i++) values[i] = static_cast<float>(i);
    std::vector<double> doubles(values.begin(), values.end());
    write_tensor(path("F32"), {"x", "F32", {rows, width}}, values);
    write_tensor(path("F64"), {"x", "F64", {rows, width}}, doubles);

    for (const char* dtype : {"F32", "F64"}) {
        const SafetensorsReader reader(path(dtype));
        EXPECT_EQ(reader.read("x"), values);
        for (const auto& [row, n] :
             std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {1, 2}, {17, 2900}, {3000, 1}, {3001, 0}}) {
            std::vector<float> out(n * width + 1, -1);
            reader.read_rows("x", row, n, out.data());
            EXPECT_TRUE(std::equal(out.begin(), out.end() - 1, values.begin() + row * width));
            EXPECT_EQ(out.back(), -1) << "wrote past the rows";
        }
        float untouched = 0;
        for (const auto& [row, n] :
             std::vector<std::pair<int64_t, int64_t>>{{0, 3002}, {3001, 1}, {-1, 1}, {0, -1}, {1, INT64_MAX}}) {
            expect_mentions(error_of([&, row = row, n = n] { reader.read_rows("x", row, n, &untouched); }),
                            {path(dtype), "\"x\"", "3001 rows"});
        }
    }
    write_tensor(path("t"), {"scalar", "F32", {}}, std::vector<float>{5});
    float scalar = 0;
    SafetensorsReader(path("t")).read_rows("scalar", 0, 1, &scalar);
    EXPECT_EQ(scalar, 5);
}

TEST_F(SafetensorsFile, RefusesToReadWhatIsNotThereOrNoNumber) {
    write_tensor(path("t"), {"ids", "I32", {1}}, std::vector<int32_t>{1});
    const SafetensorsReader reader(path("t"));
    EXPECT_FALSE(reader.has("x"));
    expect_mentions(error_of([&] { reader.spec("x"); }), {path("t"), "no tensor \"x\""});
    expect_mentions(error_of([&] { reader.read("x\ny"); }), {"\"x\\ny\""});
    expect_mentions(error_of([&] { reader.read("ids"); }), {path("t"), "\"ids\"", "I32"});
}

TEST_F(SafetensorsFile, ChecksWhatTheWriterIsGiven) {
    const auto file = [&](std::vector<TensorSpec> specs) { return SafetensorsWriter(path("t"), std::move(specs)); };
    expect_mentions(error_of([&] { file({{"x", "F32", {1}}, {"x", "F32", {1}}}); }), {path("t"), "\"x\"", "twice"});
    expect_mentions(error_of([&] { file({{"__metadata__", "F32", {1}}}); }), {"__metadata__"});
    expect_mentions(error_of([&] { file({{"x", "float", {1}}}); }), {path("t"), "\"x\"", "\"float\""});
    expect_mentions(error_of([&] { file({{"x", "F32", {2, -1}}}); }), {path("t"), "\"x\"", "[2,-1]"});
    expect_mentions(error_of([&] { file({{"x", "F32", {int64_t{1} << 40, int64_t{1} << 40}}}); }), {"shape"});

    const std::vector<TensorSpec> specs = {{"x", "F32", {2}}, {"empty", "F32", {0}}, {"y", "U8", {4}}};
    for (size_t bytes = 0; bytes <= 14; bytes++) {
        SCOPED_TRACE(bytes);
        SafetensorsWriter writer = file(specs);
        const auto fill = [&] {
            for (size_t i = 0; i < bytes; i++) writer.write("a", 1);
            writer.close();
        };
        if (bytes == 12) {
            fill();
            EXPECT_EQ(tensors_are_whole(path("t")), "");
        } else {
            const char* tensor = bytes < 8 ? "\"x\"" : bytes < 12 ? "\"y\"" : "more bytes";
            expect_mentions(error_of(fill),
                            {path("t"), tensor, "expected 12", "got " + std::to_string(std::min<size_t>(bytes, 13))});
            EXPECT_EQ(tensors_are_whole(path("t")).empty(), bytes > 12) << "the surplus must not reach the file";
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Model folders

TEST_F(SafetensorsFile, OpensAModelFolder) {
    fs::create_directory(path("model"));
    expect_mentions(error_of([&] { SafetensorsReader reader(path("model")); }), {path("model"), "model.safetensors"});
    write_tensor(path("model/model.safetensors"), {"x", "F32", {1}}, std::vector<float>{5});
    EXPECT_EQ(SafetensorsReader(path("model")).read("x"), std::vector<float>{5});
    expect_mentions(error_of([&] { SafetensorsReader reader(path("none")); }), {path("none"), "No such file"});
}

TEST_F(SafetensorsFile, OpensShards) {
    write_tensor(path("model-1.safetensors"), {"x", "F32", {1}}, std::vector<float>{5});
    SafetensorsWriter second(path("model-2.safetensors"), {{"y", "F32", {1}}, {"z", "F64", {1}}}, {{"norm", "LNS"}});
    second.write(std::vector<float>{6}.data(), 4);
    second.write(std::vector<double>{7}.data(), 8);
    second.close();
    const std::string index = path("model.safetensors.index.json");
    write_file(index, R"({"metadata": {"total_size": 16}, "weight_map": {"z": "model-2.safetensors",
        "x": "model-1.safetensors", "y": "model-2.safetensors"}})");
    const SafetensorsReader reader(folder);
    EXPECT_EQ(reader.names(), (std::vector<std::string>{"x", "y", "z"}));
    EXPECT_EQ(reader.read("x"), std::vector<float>{5});
    EXPECT_EQ(reader.read("y"), std::vector<float>{6});
    EXPECT_EQ(reader.read("z"), std::vector<float>{7});
    EXPECT_EQ(reader.metadata().at("norm"), "LNS");

    const auto error = [&](const std::string& json) {
        write_file(index, json);
        return error_of([&] { SafetensorsReader reader(folder); });
    };
    expect_mentions(error("{"), {index, "weight_map"});
    expect_mentions(error("[1]"), {index, "weight_map"});
    expect_mentions(error(R"({"weight_map": 1})"), {index, "weight_map"});
    expect_mentions(error(R"({"weight_map": {"x": 1}})"), {index, "\"x\""});
    expect_mentions(error(R"({"weight_map": {"x": "none"}})"), {path("none"), "No such file"});
    expect_mentions(error(R"({"weight_map": {"y": "model-1.safetensors"}})"),
                    {path("model-1.safetensors"), "\"y\"", index});
    fs::resize_file(path("model-2.safetensors"), fs::file_size(path("model-2.safetensors")) - 1);
    expect_mentions(error(R"({"weight_map": {"y": "model-2.safetensors"}})"),
                    {path("model-2.safetensors"), "\"z\"", "truncated"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Damaged files

TEST_F(SafetensorsFile, NoticesEveryTruncation) {
    write_tensors(path("t"), {{"x", "F32", {5}}, {"y", "BF16", {3, 7}}}, random_bytes(62, 2));
    const std::string whole = read_file(path("t"));
    EXPECT_EQ(tensors_are_whole(path("t")), "");
    for (size_t size = 0; size < whole.size(); size++) {
        const std::string reason = tensors_are_whole(raw_file("cut", whole.substr(0, size)));
        EXPECT_EQ(error_of([&] { SafetensorsReader reader(path("cut")); }), reason);
        expect_mentions(reason, {path("cut"), "truncated"});
        if (size + 62 >= whole.size()) expect_mentions(reason, {size + 42 >= whole.size() ? "\"y\"" : "\"x\""});
    }
    expect_mentions(tensors_are_whole(raw_file("long", whole + "!")), {path("long"), std::to_string(whole.size())});
    expect_mentions(tensors_are_whole(path("none")), {path("none"), "No such file"});
    expect_mentions(tensors_are_whole("/dev/zero"), {"/dev/zero", "not a regular file"});
}

// A flipped bit may by chance give another valid header ("x" for "y"); then everything it promises must be readable.
TEST_F(SafetensorsFile, SurvivesEveryFlippedBitOfTheHeader) {
    write_tensors(path("t"), {{"x", "F32", {2, 2}}, {"y", "BF16", {3}}}, random_bytes(22, 3));
    const std::string whole = read_file(path("t"));
    int noticed = 0;
    for (size_t bit = 0; bit < (whole.size() - 22) * 8; bit++) {
        std::string flipped = whole;
        flipped[bit / 8] ^= static_cast<char>(1 << bit % 8);
        const std::string file = raw_file("flipped", flipped);
        try {
            const SafetensorsReader reader(file);
            for (const std::string& name : reader.names()) reader.read_bytes(name);
        } catch (const std::runtime_error& error) {
            expect_mentions(error.what(), {file});
            noticed++;
        }
        EXPECT_TRUE(bit >= 64 || !tensors_are_whole(file).empty()) << "length of the header, bit " << bit;
    }
    EXPECT_GT(noticed, 500);
}

TEST_F(SafetensorsFile, ExplainsDamage) {
    const auto reason = [&](const std::string& header, size_t data_bytes) {
        return tensors_are_whole(tensor_file("t", header, data_bytes));
    };
    const auto one = [&](const std::string& dtype, const std::string& shape, const std::string& offsets) {
        return reason(R"({"x":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}", 8);
    };
    EXPECT_EQ(one(R"("F32")", "[2]", "[0,8]"), "");
    expect_mentions(one(R"("F32")", "[3]", "[0,8]"), {path("t"), "\"x\"", "[3]", "12", "[0,8]"});
    expect_mentions(one(R"("F32")", "[2]", "[8,0]"), {"\"x\"", "[8,0]"});
    expect_mentions(one(R"("F99")", "[2]", "[0,8]"), {"\"x\"", "F99"});
    expect_mentions(one("7", "[2]", "[0,8]"), {"\"x\"", "dtype"});
    for (const char* bad : {"2", "[-2]", "[2.0]", "[\"2\"]", "[99999999999999999999]", "null"}) {
        expect_mentions(one(R"("F32")", bad, "[0,8]"), {"\"x\"", "shape"});
    }
    for (const char* bad : {"8", "[8]", "[0,8,9]", "[-8,0]", "[0,8.0]", "[18446744073709551608,0]",
                            "[9223372036854775800,9223372036854775807]"}) {
        expect_mentions(one(R"("F32")", "[2]", bad), {"\"x\"", "data_offsets"});
    }
    expect_mentions(one(R"("F32")", "[4611686018427387904,4]", "[0,8]"), {"\"x\"", "shape"});
    expect_mentions(one(R"("U8")", "[4611686018427387904]", "[0,4611686018427387904]"), {"\"x\"", "truncated"});
    expect_mentions(one(R"("U8")", "[0]", "[4611686018427387904,4611686018427387904]"), {"\"x\"", "hole"});
    expect_mentions(one(R"("U8")", "[7]", "[0,7]"), {"follows the last"});
    expect_mentions(one(R"("U8")", "[7]", "[1,8]"), {"\"x\"", "hole"});
    expect_mentions(reason(R"({"x":[]})", 0), {"\"x\""});

    const auto two = [&](const std::string& first, const std::string& second, int bytes) {
        return reason(R"({"x":{"dtype":"U8","shape":[4],"data_offsets":)" + first +
                          R"(},"y":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}",
                      bytes);
    };
    EXPECT_EQ(two("[0,4]", "[4,8]", 8), "");
    expect_mentions(two("[0,4]", "[3,7]", 7), {"\"y\"", "overlap"});
    expect_mentions(two("[0,4]", "[0,4]", 4), {"overlap"});
    expect_mentions(two("[5,9]", "[0,4]", 9), {"\"x\"", "hole"});
    expect_mentions(reason(
                        R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                "x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                        2),
                    {"\"x\""});

    for (const char* header : {"", "[]", "7", "{", "{\"a\": \xff}", "hello"}) {
        expect_mentions(reason(header, 0), {path("t"), "header"});
    }
    expect_mentions(reason(std::string(100000, '['), 0), {"header"});
    EXPECT_EQ(reason("{}", 0), "");
    expect_mentions(reason(R"({"__metadata__":{"epoch":3}})", 0), {"epoch"});

    for (const uint64_t length : {uint64_t{9}, uint64_t{1} << 31, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7}) {
        const std::string file = raw_file("t", std::string(reinterpret_cast<const char*>(&length), 8) + "{}      ");
        expect_mentions(tensors_are_whole(file), {path("t"), std::to_string(length)});
    }
    const std::string pointer =
        raw_file("t", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n");
    expect_mentions(tensors_are_whole(pointer), {path("t"), "git lfs pull"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Full disks

TEST_F(SafetensorsFile, ReportsAFullDisk) {
    expect_mentions(error_of([] { write_file("/dev/full", "x"); }), {"/dev/full", "No space left"});
    expect_mentions(error_of([] {
                        SafetensorsWriter writer("/dev/full", {{"x", "F32", {1}}});
                    }),
                    {"/dev/full", "No space left"});
    expect_mentions(error_of([&] { write_file(path("none/x"), "x"); }), {path("none/x"), "No such file"});
    expect_mentions(error_of([&] { read_file(path("none")); }), {path("none"), "No such file"});
    expect_mentions(error_of([&] { read_file(folder); }), {folder, "not a regular file"});
}

// Where the file may not grow on, write() first takes a part of the bytes, then fails.
TEST_F(SafetensorsFile, ReportsAShortWrite) {
    struct rlimit before {};
    getrlimit(RLIMIT_FSIZE, &before);
    const auto handler = signal(SIGXFSZ, SIG_IGN);
    const struct rlimit limit = {1000, before.rlim_max};
    SafetensorsWriter writer(path("t"), {{"x", "U8", {2000}}});
    setrlimit(RLIMIT_FSIZE, &limit);
    const std::string tensors = error_of([&] { writer.write(std::string(2000, 'x').data(), 2000); });
    const std::string text = error_of([&] { write_file(path("text"), std::string(2000, 'x')); });
    setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    expect_mentions(tensors, {path("t"), "File too large"});
    expect_mentions(text, {path("text"), "File too large"});
    EXPECT_EQ(fs::file_size(path("text")), 1000u);
}

// A pipe whose reader is slow, and a timer: write() stops at each signal, wherever it is.
TEST_F(SafetensorsFile, GoesOnAfterAnInterruptedWrite) {
    const std::vector<char> random = random_bytes(400'000, 6);
    const std::string contents(random.begin(), random.end());
    ASSERT_EQ(mkfifo(path("pipe").c_str(), 0600), 0);
    const int pipe = open(path("pipe").c_str(), O_RDWR);

    sigset_t alarm, former;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &alarm, &former);  // only the writer is to be interrupted
    std::string received;
    std::thread reader([&] {
        std::vector<char> piece(4096);
        struct pollfd ready = {pipe, POLLIN, 0};
        while (received.size() < contents.size() && poll(&ready, 1, 2000) == 1) {  // 2 s: the writer lost bytes
            usleep(500);
            const ssize_t n = read(pipe, piece.data(), piece.size());
            if (n > 0) received.append(piece.data(), n);
        }
    });
    pthread_sigmask(SIG_SETMASK, &former, nullptr);
    struct sigaction action {
    }, before{};
    action.sa_handler = [](int) {};
    sigaction(SIGALRM, &action, &before);
    const struct itimerval every_two_ms = {{0, 2000}, {0, 2000}}, never = {};
    setitimer(ITIMER_REAL, &every_two_ms, nullptr);
    EXPECT_NO_THROW(write_file(path("pipe"), contents));
    setitimer(ITIMER_REAL, &never, nullptr);
    sigaction(SIGALRM, &before, nullptr);

    reader.join();
    close(pipe);
    EXPECT_TRUE(received == contents);
}

TEST_F(SafetensorsFile, WritesSmallFiles) {
    for (const std::string& contents : {std::string("{}\n"), std::string(), std::string("a\0b", 3)}) {
        write_file(path("x"), contents);
        EXPECT_EQ(read_file(path("x")), contents);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoint folders

std::string save(const std::string& run, int64_t step, const std::string& contents) {
    CheckpointFolder checkpoint(run, step);
    fs::create_directory(checkpoint.path() + "/state");
    write_file(checkpoint.path() + "/state/a", contents);
    write_file(checkpoint.path() + "/b", contents);
    return checkpoint.publish();
}

std::vector<int64_t> steps(const std::string& run) {
    std::vector<int64_t> result;
    for (const auto& [step, path] : list_checkpoints(run)) {
        EXPECT_EQ(path, run + "/checkpoints/" + checkpoint_name(step));
        result.push_back(step);
    }
    return result;
}

// All names under checkpoints/, hidden ones too.
std::vector<std::string> entries(const std::string& run) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(run + "/checkpoints")) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
}

TEST_F(CheckpointFolders, AppearWhenPublished) {
    EXPECT_EQ(checkpoint_name(0), "step_00000000");
    EXPECT_EQ(checkpoint_name(100), "step_00000100");
    EXPECT_EQ(checkpoint_name(1234567890), "step_1234567890");
    const std::string run = path("runs/a");
    EXPECT_TRUE(list_checkpoints(run).empty());

    CheckpointFolder checkpoint(run, 100);
    EXPECT_EQ(checkpoint.path(), run + "/checkpoints/.step_00000100.tmp");
    write_file(checkpoint.path() + "/x", "1");
    EXPECT_TRUE(list_checkpoints(run).empty());
    EXPECT_EQ(checkpoint.publish(), run + "/checkpoints/step_00000100");
    EXPECT_EQ(steps(run), std::vector<int64_t>{100});
    EXPECT_EQ(read_file(run + "/checkpoints/step_00000100/x"), "1");
    EXPECT_EQ(entries(run), std::vector<std::string>{"step_00000100"});
}

TEST_F(CheckpointFolders, AreListedByStep) {
    for (const int64_t step : {int64_t{1000000000}, int64_t{0}, int64_t{999999999}, int64_t{50}})
        save(folder, step, "x");
    for (const char* stranger :
         {"step_7", "step_00000007x", "step_-0000007", "step_ 0000007", ".step_00000007.tmp", "best"}) {
        fs::create_directory(path(std::string("checkpoints/") + stranger));
    }
    raw_file("checkpoints/step_00000008", "a file");
    EXPECT_EQ(steps(folder), (std::vector<int64_t>{0, 50, 999999999, 1000000000}));
}

TEST_F(CheckpointFolders, VanishUnpublished) {
    EXPECT_ANY_THROW({
        CheckpointFolder checkpoint(folder, 100);
        write_file(checkpoint.path() + "/x", "1");
        throw std::runtime_error("the disk is full");
    });
    EXPECT_TRUE(entries(folder).empty());
    raw_file("file", "");
    expect_mentions(error_of([&] { CheckpointFolder checkpoint(path("file"), 100); }),
                    {path("file"), "Not a directory"});
}

TEST_F(CheckpointFolders, ReplaceTheOneOfTheSameStep) {
    save(folder, 100, "old");
    write_file(path("checkpoints/step_00000100/only in the old one"), "");
    const std::string published = save(folder, 100, "new");
    EXPECT_EQ(read_file(published + "/b"), "new");
    EXPECT_EQ(read_file(published + "/state/a"), "new");
    EXPECT_FALSE(fs::exists(published + "/only in the old one"));
    EXPECT_EQ(entries(folder), std::vector<std::string>{"step_00000100"});
}

TEST_F(CheckpointFolders, AreReplacedWhereNamesCannotBeExchangedToo) {
    constexpr unsigned refused = ~0u;  // renameat2 knows no such flags, and fails as it does on NFS
    for (const unsigned flags : {unsigned{RENAME_EXCHANGE}, refused}) {
        for (const char* name : {"new", "old", "aside"}) {
            fs::create_directory(path(name));
            write_file(path(name) + "/name", name);
        }
        checkpoint_io::replace_folder(path("new"), path("old"), path("aside"), flags);
        EXPECT_EQ(read_file(path("old/name")), "new");
        EXPECT_EQ(read_file(path("aside/name")), "old");
        EXPECT_FALSE(fs::exists(path("new")));
    }
}

// Runs `action` in a process of its own, and kills it (SIGKILL) after the given time, or when it asks for it.
void run_and_kill(const std::function<void()>& action, int microseconds) {
    const pid_t child = fork();
    if (child == 0) {
        action();
        _exit(0);
    }
    if (microseconds >= 0) {
        usleep(microseconds);
        kill(child, SIGKILL);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

TEST_F(CheckpointFolders, OutliveAKillBeforePublishing) {
    save(folder, 50, "good");
    run_and_kill(
        [&] {
            CheckpointFolder checkpoint(folder, 100);
            write_file(checkpoint.path() + "/b", "half");
            raise(SIGKILL);
        },
        -1);
    EXPECT_TRUE(fs::exists(path("checkpoints/.step_00000100.tmp/b"))) << "the kill came too early";
    EXPECT_EQ(steps(folder), std::vector<int64_t>{50});
    EXPECT_EQ(read_file(path("checkpoints/step_00000050/b")), "good");

    CheckpointFolder again(folder, 100);
    EXPECT_TRUE(fs::is_empty(again.path())) << "the killed run's files would be published";
    CheckpointFolder other(folder, 150);
    EXPECT_EQ(entries(folder), (std::vector<std::string>{".step_00000150.tmp", "step_00000050"}));
}

TEST_F(CheckpointFolders, OutliveAKillAtAnyMoment) {
    save(folder, 100, "0");
    std::mt19937 random(4);
    for (int round = 0; round < 30; round++) {
        run_and_kill(
            [&] {
                for (int i = 0;; i++) save(folder, 100, std::to_string(i));
            },
            static_cast<int>(random() % 30000));
        ASSERT_EQ(steps(folder), std::vector<int64_t>{100});
        EXPECT_EQ(read_file(path("checkpoints/step_00000100/state/a")), read_file(path("checkpoints/step_00000100/b")));
    }
    save(folder, 100, "last");
    EXPECT_EQ(entries(folder), std::vector<std::string>{"step_00000100"});
}

TEST_F(CheckpointFolders, ArePruned) {
    remove_old_checkpoints(folder, 2);  // none there
    for (const int64_t step : {0, 50, 100, 150}) save(folder, step, "x");
    remove_old_checkpoints(folder, 0);
    remove_old_checkpoints(folder, -1);
    remove_old_checkpoints(folder, 4);
    EXPECT_EQ(steps(folder).size(), 4u);

    CheckpointFolder unpublished(folder, 200);
    fs::create_directory(path("checkpoints/.step_00000050.old"));  // of a kill while it was removed
    raw_file("checkpoints/.step_00000050.old/x", "");
    remove_old_checkpoints(folder, 2);
    EXPECT_EQ(entries(folder), (std::vector<std::string>{".step_00000200.tmp", "step_00000100", "step_00000150"}));
    remove_old_checkpoints(folder, 1);
    EXPECT_EQ(steps(folder), std::vector<int64_t>{150});
}

TEST_F(CheckpointFolders, AreNeverSeenHalfRemoved) {
    constexpr int files = 200;
    std::mt19937 random(5);
    for (int round = 0; round < 15; round++) {
        for (const int64_t step : {50, 100}) fs::create_directories(path("checkpoints/" + checkpoint_name(step)));
        for (int i = 0; i < files; i++) raw_file("checkpoints/step_00000050/" + std::to_string(i), "x");
        run_and_kill(
            [&] {
                remove_old_checkpoints(folder, 1);
                pause();
            },
            static_cast<int>(random() % 4000));
        for (const auto& [step, path] : list_checkpoints(folder)) {
            const auto left = std::distance(fs::directory_iterator(path), {});
            EXPECT_EQ(left, step == 50 ? files : 0);
        }
    }
}

}  // namespace
