// Tensor files: what is written comes back, and what is damaged is told.
#include "trainer/safetensors.h"

#include <cmath>

#include "file_test.h"

namespace {

namespace fs = std::filesystem;

struct SafetensorsFile : FileTest {
    // A tensor file put together by hand.
    std::string tensor_file(const std::string& name, const std::string& header, size_t data_bytes) const {
        const uint64_t length = header.size();
        return raw_file(
            name, std::string(reinterpret_cast<const char*>(&length), 8) + header + std::string(data_bytes, '\1'));
    }
};

int64_t count(const TensorSpec& spec) {
    int64_t product = 1;
    for (const int64_t dimension : spec.shape) product *= dimension;
    return product;
}

const std::map<std::string, int> widths = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
    {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8},
};

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

TEST_F(SafetensorsFile, ReadsInPieces) {
    constexpr int64_t rows = 3001, width = 701;  // several of the reader's pieces
    std::vector<float> values(rows * width);
    for (size_t i = 0; i < values.size(); i++) values[i] = static_cast<float>(i);
    const std::vector<double> doubles(values.begin(), values.end());
    write_tensor(path("F32"), {"x", "F32", {rows, width}}, values);
    write_tensor(path("F64"), {"x", "F64", {rows, width}}, doubles);
    for (const char* dtype : {"F32", "F64"}) EXPECT_EQ(SafetensorsReader(path(dtype)).read("x"), values);
    write_tensor(path("t"), {"scalar", "F32", {}}, std::vector<float>{5});
    EXPECT_EQ(SafetensorsReader(path("t")).read("scalar"), std::vector<float>{5});
}

TEST_F(SafetensorsFile, RefusesToReadWhatIsNotThereOrNoNumber) {
    write_tensor(path("t"), {"ids", "I32", {1}}, std::vector<int32_t>{1});
    const SafetensorsReader reader(path("t"));
    EXPECT_FALSE(reader.has("x"));
    expect_contains(error_of([&] { reader.spec("x"); }), {path("t"), "no tensor \"x\""});
    expect_contains(error_of([&] { reader.read("x\ny"); }), {"\"x\\ny\""});
    expect_contains(error_of([&] { reader.read("ids"); }), {path("t"), "\"ids\"", "I32"});
}

TEST_F(SafetensorsFile, ChecksWhatTheWriterIsGiven) {
    const auto file = [&](std::vector<TensorSpec> specs) { return SafetensorsWriter(path("t"), std::move(specs)); };
    expect_contains(error_of([&] { file({{"x", "F32", {1}}, {"x", "F32", {1}}}); }), {path("t"), "\"x\"", "twice"});
    expect_contains(error_of([&] { file({{"__metadata__", "F32", {1}}}); }), {"__metadata__"});
    expect_contains(error_of([&] { file({{"x", "float", {1}}}); }), {path("t"), "\"x\"", "\"float\""});
    expect_contains(error_of([&] { file({{"x", "F32", {2, -1}}}); }), {path("t"), "\"x\"", "[2,-1]"});
    expect_contains(error_of([&] { file({{"x", "F32", {int64_t{1} << 40, int64_t{1} << 40}}}); }), {"shape"});

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
            expect_contains(error_of(fill),
                            {path("t"), tensor, "expected 12", "got " + std::to_string(std::min<size_t>(bytes, 13))});
            EXPECT_EQ(tensors_are_whole(path("t")).empty(), bytes > 12) << "the surplus must not reach the file";
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Model folders

TEST_F(SafetensorsFile, OpensAModelFolder) {
    fs::create_directory(path("model"));
    expect_contains(error_of([&] { SafetensorsReader reader(path("model")); }), {path("model"), "model.safetensors"});
    write_tensor(path("model/model.safetensors"), {"x", "F32", {1}}, std::vector<float>{5});
    EXPECT_EQ(SafetensorsReader(path("model")).read("x"), std::vector<float>{5});
    expect_contains(error_of([&] { SafetensorsReader reader(path("none")); }), {path("none"), "No such file"});
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
    expect_contains(error("{"), {index, "weight_map"});
    expect_contains(error("[1]"), {index, "weight_map"});
    expect_contains(error(R"({"weight_map": 1})"), {index, "weight_map"});
    expect_contains(error(R"({"weight_map": {"x": 1}})"), {index, "\"x\""});
    expect_contains(error(R"({"weight_map": {"x": "none"}})"), {path("none"), "No such file"});
    expect_contains(error(R"({"weight_map": {"y": "model-1.safetensors"}})"),
                    {path("model-1.safetensors"), "\"y\"", index});
    fs::resize_file(path("model-2.safetensors"), fs::file_size(path("model-2.safetensors")) - 1);
    expect_contains(error(R"({"weight_map": {"y": "model-2.safetensors"}})"),
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
        expect_contains(reason, {path("cut"), "truncated"});
        if (size + 62 >= whole.size()) expect_contains(reason, {size + 42 >= whole.size() ? "\"y\"" : "\"x\""});
    }
    expect_contains(tensors_are_whole(raw_file("long", whole + "!")), {path("long"), std::to_string(whole.size())});
    expect_contains(tensors_are_whole(path("none")), {path("none"), "No such file"});
    expect_contains(tensors_are_whole("/dev/zero"), {"/dev/zero", "not a regular file"});
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
            expect_contains(error.what(), {file});
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
    expect_contains(one(R"("F32")", "[3]", "[0,8]"), {path("t"), "\"x\"", "[3]", "12", "[0,8]"});
    expect_contains(one(R"("F32")", "[2]", "[8,0]"), {"\"x\"", "[8,0]"});
    expect_contains(one(R"("F99")", "[2]", "[0,8]"), {"\"x\"", "F99"});
    expect_contains(one("7", "[2]", "[0,8]"), {"\"x\"", "dtype"});
    for (const char* bad : {"2", "[-2]", "[2.0]", "[\"2\"]", "[99999999999999999999]", "null"}) {
        expect_contains(one(R"("F32")", bad, "[0,8]"), {"\"x\"", "shape"});
    }
    for (const char* bad : {"8", "[8]", "[0,8,9]", "[-8,0]", "[0,8.0]", "[18446744073709551608,0]",
                            "[9223372036854775800,9223372036854775807]"}) {
        expect_contains(one(R"("F32")", "[2]", bad), {"\"x\"", "data_offsets"});
    }
    expect_contains(one(R"("F32")", "[4611686018427387904,4]", "[0,8]"), {"\"x\"", "shape"});
    expect_contains(one(R"("U8")", "[4611686018427387904]", "[0,4611686018427387904]"), {"\"x\"", "truncated"});
    expect_contains(one(R"("U8")", "[0]", "[4611686018427387904,4611686018427387904]"), {"\"x\"", "hole"});
    expect_contains(one(R"("U8")", "[7]", "[0,7]"), {"follows the last"});
    expect_contains(one(R"("U8")", "[7]", "[1,8]"), {"\"x\"", "hole"});
    expect_contains(reason(R"({"x":[]})", 0), {"\"x\""});

    const auto two = [&](const std::string& first, const std::string& second, int bytes) {
        return reason(R"({"x":{"dtype":"U8","shape":[4],"data_offsets":)" + first +
                          R"(},"y":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}",
                      bytes);
    };
    EXPECT_EQ(two("[0,4]", "[4,8]", 8), "");
    expect_contains(two("[0,4]", "[3,7]", 7), {"\"y\"", "overlap"});
    expect_contains(two("[0,4]", "[0,4]", 4), {"overlap"});
    expect_contains(two("[5,9]", "[0,4]", 9), {"\"x\"", "hole"});
    expect_contains(reason(
                        R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                "x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                        2),
                    {"\"x\""});

    for (const char* header : {"", "[]", "7", "{", "{\"a\": \xff}", "hello"}) {
        expect_contains(reason(header, 0), {path("t"), "header"});
    }
    expect_contains(reason(std::string(100000, '['), 0), {"header"});
    EXPECT_EQ(reason("{}", 0), "");
    expect_contains(reason(R"({"__metadata__":{"epoch":3}})", 0), {"epoch"});

    for (const uint64_t length : {uint64_t{9}, uint64_t{1} << 31, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7}) {
        const std::string file = raw_file("t", std::string(reinterpret_cast<const char*>(&length), 8) + "{}      ");
        expect_contains(tensors_are_whole(file), {path("t"), std::to_string(length)});
    }
    const std::string pointer =
        raw_file("t", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n");
    expect_contains(tensors_are_whole(pointer), {path("t"), "git lfs pull"});
}

TEST_F(SafetensorsFile, ReportsAFullDisk) {
    expect_contains(error_of([] {
                        SafetensorsWriter writer("/dev/full", {{"x", "F32", {1}}});
                    }),
                    {"/dev/full", "No space left"});
}

}  // namespace
