// Which token is drawn, and text that comes in pieces.
#include "trainer/sampling.h"

#include <gtest/gtest.h>

#include <set>

namespace {

// Probabilities 0.4, 0.3, 0.15, 0.1, 0.05, in no order, and one that cannot be.
const std::vector<float> logits = {std::log(0.1f),  std::log(0.4f), -INFINITY,
                                   std::log(0.05f), std::log(0.3f), std::log(0.15f)};

// How often each is drawn by 10,000 evenly spread numbers.
std::vector<int> draws(const Sampling& sampling) {
    std::vector<int> counts(logits.size());
    for (int i = 0; i < 10000; i++) counts.at(draw_token(logits, sampling, (i + 0.5) / 10000))++;
    return counts;
}

void expect_draws(const Sampling& sampling, const std::vector<double>& probabilities) {
    const std::vector<int> counts = draws(sampling);
    for (size_t i = 0; i < counts.size(); i++) EXPECT_NEAR(counts[i] / 1e4, probabilities[i], 2e-4) << i;
}

TEST(Sampling, AllTokensByTheirProbability) { expect_draws({.temperature = 1}, {0.1, 0.4, 0, 0.05, 0.3, 0.15}); }

TEST(Sampling, TemperatureSharpens) {
    const double sum = 0.01 + 0.16 + 0.0025 + 0.09 + 0.0225;
    expect_draws({.temperature = 0.5}, {0.01 / sum, 0.16 / sum, 0, 0.0025 / sum, 0.09 / sum, 0.0225 / sum});
}

TEST(Sampling, GreedyTakesTheFirstOfTheLargest) {
    expect_draws({.temperature = 0}, {0, 1, 0, 0, 0, 0});
    EXPECT_EQ(draw_token({1, 3, 3}, {.temperature = 0}, 1), 1u);
}

TEST(Sampling, TopKKeepsTheLargest) {
    expect_draws({.temperature = 1, .top_k = 1}, {0, 1, 0, 0, 0, 0});
    expect_draws({.temperature = 1, .top_k = 2}, {0, 4 / 7.0, 0, 0, 3 / 7.0, 0});
    expect_draws({.temperature = 1, .top_k = 100}, {0.1, 0.4, 0, 0.05, 0.3, 0.15});
}

TEST(Sampling, TopPKeepsTheFewestThatReachIt) {
    expect_draws({.temperature = 1, .top_p = 0}, {0, 1, 0, 0, 0, 0});
    expect_draws({.temperature = 1, .top_p = 0.35}, {0, 1, 0, 0, 0, 0});
    expect_draws({.temperature = 1, .top_p = 0.45}, {0, 4 / 7.0, 0, 0, 3 / 7.0, 0});
    expect_draws({.temperature = 1, .top_p = 0.9}, {0.1 / 0.95, 0.4 / 0.95, 0, 0, 0.3 / 0.95, 0.15 / 0.95});
}

// Of the two that top-k leaves the first has 4/7 = 0.571, but 0.4 of all.
TEST(Sampling, TopPCountsWhatTopKLeaves) {
    expect_draws({.temperature = 1, .top_k = 2, .top_p = 0.55}, {0, 1, 0, 0, 0, 0});
    expect_draws({.temperature = 1, .top_k = 2, .top_p = 0.6}, {0, 4 / 7.0, 0, 0, 3 / 7.0, 0});
}

TEST(Sampling, ExtremesDrawWhatIsThere) {
    for (const double uniform : {0x1p-24, 1.0}) {
        EXPECT_NE(draw_token({-INFINITY, 0, -INFINITY}, {}, uniform), 0u);
        EXPECT_EQ(draw_token({-INFINITY, 0, -INFINITY}, {}, uniform), 1u);
    }
}

// Byte after byte.
std::vector<std::string> pieces(TextStream& stream, const std::string& text) {
    std::vector<std::string> all;
    for (const char byte : text) {
        all.push_back(stream.add(std::string(1, byte)));
        if (stream.stopped()) return all;
    }
    all.push_back(stream.finish());
    return all;
}

std::string joined(const std::vector<std::string>& pieces) {
    std::string all;
    for (const std::string& piece : pieces) all += piece;
    return all;
}

TEST(TextStream, NeverSplitsACharacter) {
    const std::string text = "a\u00e9\u20ac\U0001F600z";
    TextStream stream;
    const std::vector<std::string> expected = {"a", "", "\u00e9", "", "", "\u20ac", "", "", "", "\U0001F600", "z", ""};
    EXPECT_EQ(pieces(stream, text), expected);
}

TEST(TextStream, BrokenCharactersAreReplacedAsInTheWhole) {
    for (const std::string text : {"\xe2\x82", "\xe2(", "\xff\xfe", "\xf0\x9f\x98", "a\x80", "\xe2\x82\xe2\x82\xac"}) {
        std::string buffer;
        TextStream stream;
        EXPECT_EQ(joined(pieces(stream, text)), to_utf8(text, buffer));
    }
}

TEST(TextStream, EndsBeforeStop) {
    for (const std::string stop : {"END", "\u20ac", "aab"}) {
        TextStream stream(stop);
        EXPECT_EQ(joined(pieces(stream, "xEN\u00e9 aaa" + stop + "behind")), "xEN\u00e9 aaa");
        EXPECT_TRUE(stream.stopped());
    }
}

TEST(TextStream, HoldsBackWhatMayBecomeStop) {
    TextStream stream("END");
    EXPECT_EQ(stream.add("one E"), "one ");
    EXPECT_EQ(stream.add("N"), "");
    EXPECT_EQ(stream.add("T EN"), "ENT ");
    EXPECT_FALSE(stream.stopped());
    EXPECT_EQ(stream.finish(), "EN");
}

}  // namespace
