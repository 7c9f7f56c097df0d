// Any bytes as a tokenizer.json: either they load, and then encode text, or one line says why not.
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "../../tokenizer/bpe.h"
#include "trainer/files.h"

template <class Action>
static void succeeds_or_says_why(Action action) {
    try {
        action();
    } catch (const std::runtime_error& error) {
        const std::string_view message = error.what();
        if (message.empty() || message != printable(message)) std::abort();
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string_view json(reinterpret_cast<const char*>(data), size);
    succeeds_or_says_why([&] {
        const Tokenizer tokenizer = Tokenizer::parse(std::string(json), "fuzz");
        for (const Special special : {Special::parse, Special::as_text}) {
            WordCache cache;
            std::vector<uint32_t> ids, again;
            tokenizer.encode("I'll 12 \n\n <|endoftext|>\xff e\u0301 世界 aaaaaaaaaaaaaaaaaaaaaaaa", special, cache,
                             ids);
            tokenizer.encode(json.substr(0, 1000), special, cache, ids);
            tokenizer.decode(ids);
            tokenizer.encode(json.substr(0, 1000), special, cache, again);
            if (!std::equal(again.rbegin(), again.rend(), ids.rbegin())) std::abort();  // the cache changes nothing
        }
    });
    return 0;
}
