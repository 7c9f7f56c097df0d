// Learns merges from word counts.
#pragma once

#include "bpe.h"

using WordCounts = StringMap<int64_t>;

// The 256 bytes, no merges, no added tokens, GPT-2's regex: what cuts a text into words before there is a vocabulary.
Tokenizer untrained_tokenizer();
void count_words(const Tokenizer& tokenizer, std::string_view text, WordCounts& counts);

// A tokenizer of vocab_size tokens: the bytes in GPT-2's order, the merges, and the special tokens. It has fewer where
// the text has no more pairs to merge.
Tokenizer train_bpe(const WordCounts& counts, size_t vocab_size,
                    const std::vector<std::string>& special_tokens = {"<|endoftext|>"});
