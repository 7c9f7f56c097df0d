// Which token comes next, and text that is printed while it comes. Knows no model.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tokenizer/unicode.h"

// As in Hugging Face's transformers: temperature, then top-k, then top-p of what is left.
struct Sampling {
    double temperature = 0.8;  // logits are divided by it; 0: always the most likely token
    int top_k = 0;             // only the k most likely tokens, and those as likely as the last of them; 0: all
    double top_p = 1;          // only the most likely tokens, as many as reach this probability together; at least one
};

// The token that `uniform`, in (0, 1], picks. A logit of -INFINITY is never drawn.
inline uint32_t draw_token(const std::vector<float>& logits, const Sampling& sampling, double uniform) {
    const size_t V = logits.size();
    const auto best = std::max_element(logits.begin(), logits.end());
    if (sampling.temperature == 0) return (uint32_t)(best - logits.begin());
    float least = -INFINITY;
    if (sampling.top_k > 0 && (size_t)sampling.top_k < V) {
        std::vector<float> sorted = logits;
        std::nth_element(sorted.begin(), sorted.begin() + sampling.top_k - 1, sorted.end(), std::greater<float>());
        least = sorted[sampling.top_k - 1];
    }
    std::vector<double> weights(V);
    double total = 0;
    for (size_t i = 0; i < V; i++) {
        weights[i] = logits[i] < least ? 0 : std::exp(((double)logits[i] - *best) / sampling.temperature);
        total += weights[i];
    }
    if (sampling.top_p < 1) {
        std::vector<uint32_t> order;
        for (size_t i = 0; i < V; i++) {
            if (weights[i] > 0) order.push_back((uint32_t)i);
        }
        std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return weights[a] > weights[b]; });
        double before = 0;
        for (const uint32_t i : order) {
            const double weight = weights[i];
            if (before > 0 && before >= sampling.top_p * total) weights[i] = 0;
            before += weight;
        }
    }
    std::vector<double> cumulative(V);
    double sum = 0;
    for (size_t i = 0; i < V; i++) cumulative[i] = sum += weights[i];
    return (uint32_t)(std::lower_bound(cumulative.begin(), cumulative.end(), uniform * sum) - cumulative.begin());
}

// Text in pieces: whole characters only, and nothing that may turn out to be the start of `stop`. What is not UTF-8
// becomes U+FFFD.
class TextStream {
    std::string stop, text;
    size_t given = 0;  // bytes of it
    bool found = false;

    std::string take(size_t end) {
        std::string buffer;
        const std::string piece(to_utf8(std::string_view(text).substr(given, end - given), buffer));
        given = end;
        return piece;
    }

    // The end of the last character that is whole, of text up to `end`.
    size_t whole(size_t end) const {
        for (size_t back = 1; back <= 3 && back <= end - given; back++) {
            const auto byte = (uint8_t)text[end - back];
            if ((byte & 0xC0) == 0x80) continue;
            const size_t length = byte < 0xC2 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : byte < 0xF5 ? 4 : 1;
            return length > back ? end - back : end;
        }
        return end;
    }

  public:
    explicit TextStream(std::string stop = "") : stop(std::move(stop)) {}

    bool stopped() const { return found; }

    // What can be printed now that these bytes have come.
    std::string add(const std::string& bytes) {
        text += bytes;
        if (stop.empty()) return take(whole(text.size()));
        if (const size_t at = text.find(stop, given); at != text.npos) {
            found = true;
            text.resize(at);
            return take(at);
        }
        size_t held = std::min(stop.size() - 1, text.size() - given);
        while (!text.ends_with(std::string_view(stop).substr(0, held))) held--;
        return take(whole(text.size() - held));
    }

    // The rest, when nothing more comes.
    std::string finish() { return take(text.size()); }
};
