// Hugging Face's tensor files, streamed: no tensor need fit into memory.
//   SafetensorsWriter   writes a file, tensor after tensor
//   SafetensorsReader   reads a file, or a model folder of several
//   tensors_are_whole   looks for damage
//
// A safetensors file is the length of the header (8 bytes, little endian); the header, a JSON object that gives each
// tensor's dtype, shape and data_offsets [begin, end); and the data, which the tensors cover without hole or overlap.
// Errors are std::runtime_error, one line that names the file.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "trainer/crc32.h"
#include "trainer/files.h"

static_assert(std::endian::native == std::endian::little, "tensors are little endian and read as they lie on disk");

struct TensorSpec {
    std::string name;
    std::string dtype;  // "F32", "BF16", "I64", ...
    std::vector<int64_t> shape;
};

// ---------------------------------------------------------------------------------------------------------------------
// Data types and sizes

namespace safetensors {

inline int64_t dtype_bytes(const std::string& dtype) {
    static const std::map<std::string, int64_t> bytes = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
        {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8},
    };
    const auto entry = bytes.find(dtype);
    return entry == bytes.end() ? 0 : entry->second;
}

// A name or value from a file in quotes, with whatever would break the line escaped, and cut when it is long.
inline std::string in_quotes(const nlohmann::json& value) {
    const std::string line = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    return line.size() <= 200 ? line : line.substr(0, 200) + "...";
}

// The size of a tensor in a file. A shape from a damaged file may have any product.
inline int64_t tensor_bytes(const std::string& path, const TensorSpec& spec) {
    int64_t bytes = dtype_bytes(spec.dtype);
    if (bytes == 0) {
        fail(path, "tensor " + in_quotes(spec.name) + ": unknown dtype " + in_quotes(spec.dtype) +
                       "; expected F32, BF16, F16, F64 or an integer type; convert it");
    }
    for (const int64_t dimension : spec.shape) {
        if (dimension < 0 || __builtin_mul_overflow(bytes, dimension, &bytes)) {
            fail(path, "tensor " + in_quotes(spec.name) + ": impossible shape " + in_quotes(spec.shape));
        }
    }
    return bytes;
}

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// The exponent and mantissa bits moved to their places in a float mean the number times 2^-112 (the biases are 15 and
// 127), subnormals included. Infinity and NaN have the largest exponent in both formats.
inline float f16_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
    const uint32_t magnitude = uint32_t{bits & 0x7fffu} << 13;
    const bool finite = (bits & 0x7c00) != 0x7c00;
    const float value =
        finite ? std::bit_cast<float>(magnitude) * 0x1p112f : std::bit_cast<float>(magnitude | 0x7f800000);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

inline bool is_float(const std::string& dtype) {
    return dtype == "F32" || dtype == "BF16" || dtype == "F16" || dtype == "F64";
}

// Writes the values to out, and returns where the next ones go.
inline float* convert(const std::string& dtype, const std::vector<char>& raw, float* out) {
    const auto each = [&]<class T>(T value, auto to_float) {
        for (size_t i = 0; i < raw.size(); i += sizeof(T)) {
            std::memcpy(&value, raw.data() + i, sizeof(T));
            *out++ = to_float(value);
        }
    };
    if (dtype == "BF16") each(uint16_t(), bf16_to_float);
    else if (dtype == "F16") each(uint16_t(), f16_to_float);
    else if (dtype == "F64") each(double(), [](double x) { return (float)x; });
    else each(float(), [](float x) { return x; });
    return out;
}

}  // namespace safetensors

// ---------------------------------------------------------------------------------------------------------------------
// Writing tensors

// Writes the header, then takes the tensors' bytes in the order of the specs, in pieces of any size. The file is whole
// only after close(). Where types of different widths share a file, put the wider ones first: PyTorch wants each
// tensor at a multiple of its element size, and the format leaves no room for padding between tensors.
class SafetensorsWriter {
  public:
    SafetensorsWriter(const std::string& path, std::vector<TensorSpec> tensors,
                      std::map<std::string, std::string> metadata = {})
        : file_(File::create(path)), tensors_(std::move(tensors)) {
        metadata["format"] = "pt";  // transformers refuses a file without it
        nlohmann::json header = {{"__metadata__", metadata}};
        for (const TensorSpec& spec : tensors_) {
            if (header.contains(spec.name)) fail("tensor " + safetensors::in_quotes(spec.name) + " is given twice");
            const int64_t begin = total_bytes_;
            total_bytes_ += safetensors::tensor_bytes(path, spec);
            header[spec.name] = {{"dtype", spec.dtype}, {"shape", spec.shape}, {"data_offsets", {begin, total_bytes_}}};
        }
        std::string json = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
        json.resize((json.size() + 7) / 8 * 8, ' ');  // the data starts at a multiple of 8
        const uint64_t length = json.size();
        append(&length, sizeof length);
        append(json.data(), json.size());
    }

    void write(const void* data, size_t bytes) {
        if (bytes > static_cast<uint64_t>(total_bytes_ - written_)) {
            fail("more bytes than its " + std::to_string(tensors_.size()) + " tensors have: expected " +
                 std::to_string(total_bytes_) + ", got " + std::to_string(written_ + bytes));
        }
        append(data, bytes);
        written_ += bytes;
    }

    // Of all that was written so far, header included.
    uint32_t crc32() const { return crc32_; }

    // Checks that every byte came. On disk when it returns.
    void close() {
        if (written_ < total_bytes_) {
            int64_t end = 0;
            auto unfinished = tensors_.begin();
            while ((end += safetensors::tensor_bytes(file_.path(), *unfinished)) <= written_) unfinished++;
            fail("closed at tensor " + safetensors::in_quotes(unfinished->name) +
                 ", before all its tensors were written: expected " + std::to_string(total_bytes_) + " bytes, got " +
                 std::to_string(written_));
        }
        file_.sync();
        file_.close();
    }

  private:
    [[noreturn]] void fail(const std::string& what) const { ::fail(file_.path(), what); }

    void append(const void* data, size_t bytes) {
        file_.write(data, bytes);
        crc32_ = crc32_of(crc32_, data, bytes);
    }

    File file_;
    uint32_t crc32_ = 0;
    std::vector<TensorSpec> tensors_;
    int64_t total_bytes_ = 0;  // of all tensors
    int64_t written_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Reading tensors

namespace safetensors {

struct TensorLocation {
    TensorSpec spec;
    int64_t offset, bytes;  // in the file
    size_t file = 0;        // which of the reader's files
};

struct Header {
    std::map<std::string, TensorLocation> tensors;
    std::map<std::string, std::string> metadata;
};

[[noreturn]] inline void fail_damaged(const std::string& path, const std::string& what) {
    fail(path, what + "; copy or save it again");
}

// The header, and where the data begins.
inline std::pair<nlohmann::json, int64_t> read_header_json(const File& file) {
    constexpr int64_t max_length = 100'000'000;  // as in Hugging Face's reader
    const int64_t size = file.size();
    uint64_t length = 0;
    if (size < (int64_t)sizeof length) {
        fail_damaged(file.path(), "truncated: " + std::to_string(size) + " bytes, shorter than any header");
    }
    file.read(0, sizeof length, &length);
    if (std::memcmp(&length, "version ", sizeof length) == 0) {
        fail(file.path(), "expected tensors, found a Git LFS pointer; run `git lfs pull`");
    }
    if (length > std::min<uint64_t>(max_length, size - sizeof length)) {
        fail_damaged(file.path(), "truncated or no safetensors file: a header of " + std::to_string(length) +
                                      " bytes cannot stand in a file of " + std::to_string(size));
    }
    std::string text(length, '\0');
    file.read(sizeof length, length, text.data());
    nlohmann::json header = nlohmann::json::parse(text, nullptr, false);
    if (!header.is_object()) fail_damaged(file.path(), "the header is not a JSON object");
    return {std::move(header), sizeof length + length};
}

// Dimensions and offsets, small enough that the sum of two of them does not overflow.
inline bool is_sizes(const nlohmann::json& list) {
    constexpr uint64_t max_size = uint64_t{1} << 62;
    return list.is_array() && std::all_of(list.begin(), list.end(), [](const nlohmann::json& x) {
               return x.is_number_unsigned() && x.get<uint64_t>() <= max_size;
           });
}

// One entry of the header, whose offsets count from data_begin.
inline TensorLocation parse_tensor(const std::string& path, const std::string& name, const nlohmann::json& entry,
                                   int64_t data_begin) {
    const auto field = [&](const char* key) { return entry.is_object() ? entry.value(key, nlohmann::json()) : entry; };
    const nlohmann::json dtype = field("dtype"), shape = field("shape"), offsets = field("data_offsets");
    if (!dtype.is_string() || !is_sizes(shape) || !is_sizes(offsets) || offsets.size() != 2) {
        fail_damaged(path, "tensor " + in_quotes(name) +
                               ": expected dtype, shape and data_offsets [begin, end], found " + in_quotes(entry));
    }
    TensorLocation tensor = {{name, dtype, shape}, data_begin + offsets[0].get<int64_t>(), 0};
    tensor.bytes = tensor_bytes(path, tensor.spec);
    if (offsets[1].get<int64_t>() - offsets[0].get<int64_t>() != tensor.bytes) {
        fail_damaged(path, "tensor " + in_quotes(name) + ": " + tensor.spec.dtype + " of shape " + in_quotes(shape) +
                               " has " + std::to_string(tensor.bytes) + " bytes, found data_offsets " +
                               in_quotes(offsets));
    }
    return tensor;
}

// The tensors must cover the file from data_begin to its end, each where the one before it ends.
inline void check_layout(const File& file, const std::map<std::string, TensorLocation>& tensors, int64_t data_begin) {
    std::vector<const TensorLocation*> by_offset;
    for (const auto& [name, tensor] : tensors) by_offset.push_back(&tensor);
    std::sort(by_offset.begin(), by_offset.end(), [](const TensorLocation* a, const TensorLocation* b) {
        return std::pair(a->offset, a->bytes) < std::pair(b->offset, b->bytes);
    });
    const int64_t size = file.size();
    int64_t end = data_begin;
    for (const TensorLocation* tensor : by_offset) {
        const std::string name = "tensor " + in_quotes(tensor->spec.name);
        if (tensor->offset != end) {
            fail_damaged(file.path(),
                         name + (tensor->offset < end ? ": overlaps the tensor before it" : ": a hole before it") +
                             ", expected at byte " + std::to_string(end) + ", found at byte " +
                             std::to_string(tensor->offset));
        }
        if (tensor->bytes > size - end) {
            fail_damaged(file.path(), "truncated: " + name + " needs " + std::to_string(tensor->bytes) +
                                          " bytes, found " + std::to_string(size - end));
        }
        end += tensor->bytes;
    }
    if (end != size) {
        fail_damaged(file.path(), "expected " + std::to_string(end) + " bytes, found " + std::to_string(size) +
                                      ": something follows the last tensor");
    }
}

inline Header read_header(const File& file) {
    const auto [json, data_begin] = read_header_json(file);
    Header header;
    for (const auto& [name, entry] : json.items()) {
        if (name != "__metadata__") {
            header.tensors[name] = parse_tensor(file.path(), name, entry, data_begin);
            continue;
        }
        for (const auto& [key, value] : entry.items()) {
            if (!value.is_string()) fail_damaged(file.path(), "metadata " + in_quotes(key) + ": expected a string");
            header.metadata[key] = value;
        }
    }
    check_layout(file, header.tensors, data_begin);
    return header;
}

}  // namespace safetensors

// Opens a .safetensors file, or a model folder: model.safetensors, or the shards that model.safetensors.index.json
// lists. The headers are checked against the files' sizes at once; data is read when asked for, from any thread.
class SafetensorsReader {
  public:
    explicit SafetensorsReader(const std::string& path) : path_(path) {
        const std::string single = path + "/model.safetensors", index = single + ".index.json";
        if (!std::filesystem::is_directory(path)) {
            tensors_ = open_file(path);
        } else if (std::filesystem::exists(single)) {
            tensors_ = open_file(single);
        } else if (std::filesystem::exists(index)) {
            open_shards(index);
        } else {
            ::fail(path,
                   "expected model.safetensors or model.safetensors.index.json here, found neither; "
                   "a model in another format must be converted first");
        }
    }

    bool has(const std::string& name) const { return tensors_.contains(name); }
    const TensorSpec& spec(const std::string& name) const { return find(name).spec; }
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

    // In alphabetical order.
    std::vector<std::string> names() const {
        std::vector<std::string> result;
        for (const auto& [name, tensor] : tensors_) result.push_back(name);
        return result;
    }

    // As floats, from F32, BF16, F16 or F64.
    std::vector<float> read(const std::string& name) const {
        const Tensor& tensor = find(name);
        const File& file = files_[tensor.file];
        const std::string& dtype = tensor.spec.dtype;
        if (!safetensors::is_float(dtype)) {
            ::fail(file.path(),
                   "tensor " + safetensors::in_quotes(name) + ": expected F32, BF16, F16 or F64, found " + dtype);
        }
        std::vector<float> result(tensor.bytes / safetensors::dtype_bytes(dtype));
        if (dtype == "F32") {
            file.read(tensor.offset, tensor.bytes, result.data());
            return result;
        }
        float* out = result.data();
        std::vector<char> piece(std::min<int64_t>(tensor.bytes, 1 << 20));
        for (int64_t done = 0; done < tensor.bytes; done += piece.size()) {
            piece.resize(std::min<int64_t>(piece.size(), tensor.bytes - done));
            file.read(tensor.offset + done, piece.size(), piece.data());
            out = safetensors::convert(dtype, piece, out);
        }
        return result;
    }

    // As it lies on disk, of any dtype.
    std::vector<char> read_bytes(const std::string& name) const {
        const Tensor& tensor = find(name);
        std::vector<char> result(tensor.bytes);
        files_[tensor.file].read(tensor.offset, tensor.bytes, result.data());
        return result;
    }

  private:
    using Tensor = safetensors::TensorLocation;

    std::map<std::string, Tensor> open_file(const std::string& path) {
        const size_t index = files_.size();
        safetensors::Header header = safetensors::read_header(files_.emplace_back(path));
        for (auto& [name, tensor] : header.tensors) tensor.file = index;
        metadata_.merge(header.metadata);
        return std::move(header.tensors);
    }

    // The index's "weight_map" says which file holds which tensor.
    void open_shards(const std::string& index) {
        const nlohmann::json json = nlohmann::json::parse(read_file(index), nullptr, false);
        const nlohmann::json places = json.is_object() ? json.value("weight_map", nlohmann::json()) : json;
        if (!places.is_object()) ::fail(index, "expected {\"weight_map\": {tensor: file}}; copy it again");
        std::map<std::string, std::map<std::string, Tensor>> shards;
        for (const auto& [name, file] : places.items()) {
            const std::string tensor = "tensor " + safetensors::in_quotes(name);
            if (!file.is_string()) ::fail(index, tensor + ": expected the name of a file");
            const std::string shard = path_ + "/" + file.get<std::string>();
            if (!shards.contains(shard)) shards[shard] = open_file(shard);
            if (!shards[shard].contains(name)) {
                ::fail(shard, "no " + tensor + ", which " + index + " places here; copy both again");
            }
            tensors_.insert(shards[shard].extract(name));
        }
    }

    const Tensor& find(const std::string& name) const {
        const auto tensor = tensors_.find(name);
        if (tensor != tensors_.end()) return tensor->second;
        ::fail(path_, "no tensor " + safetensors::in_quotes(name) + " among its " + std::to_string(tensors_.size()) +
                          "; is this the model that config.json describes?");
    }

    std::string path_;
    std::vector<File> files_;
    std::map<std::string, Tensor> tensors_;
    std::map<std::string, std::string> metadata_;
};

// Why the file (or model folder) is damaged, or an empty string. Looks at headers and sizes, so that it is quick
// whatever the size; bytes flipped within a tensor go unseen.
inline std::string tensors_are_whole(const std::string& path) {
    try {
        const SafetensorsReader reader(path);
        return "";
    } catch (const std::exception& error) {
        return error.what();
    }
}
