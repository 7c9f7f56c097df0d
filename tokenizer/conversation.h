// Conversations that a model is tuned on: read from JSON in the forms they come in, and written out by a template.
//
//   {"messages": [{"role": "user", "content": TEXT}, ...]}    answers are the messages of the role "assistant"
//   {"prompt": TEXT, "completion": TEXT}                      or a list of messages each; answers are the completion's
//   {"instruction": TEXT, "input": TEXT, "output": TEXT}      Alpaca's; "input" may be missing or empty
//   {"question": TEXT, "answer": TEXT}
//
// The first form whose fields are there counts, and other fields are ignored. Training predicts the answers alone, each
// with the token that ends it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.h"

struct Message {
    std::string role, content;
    std::string input = {};  // Alpaca's, what an instruction is about
    bool is_answer = false;  // that training predicts
};

struct Conversation {
    std::vector<Message> messages;
    bool joined = false;  // prompt and completion are two parts of one text: plain puts nothing between them

    std::string text() const;  // of all messages: what tells it from others
    bool has_answer() const;
};

// Throws a JsonError.
Conversation read_conversation(std::string_view json);

// Whether this is a conversation, and no document with a text in the field of that name.
bool is_conversation(std::string_view json, const std::string& field);

// An answer among a conversation's tokens, with the token that ends it.
struct AnswerTokens {
    size_t begin, end;
};

struct EncodedConversation {
    std::vector<uint32_t> tokens;  // the first is the one that starts a document
    std::vector<AnswerTokens> answers;
};

// How the messages are written out. What they say is text, whatever special tokens it names. A text is encoded up to
// where an answer begins, and from there: the answer's tokens are those that a model is asked for behind its prompt.
class ChatTemplate {
  public:
    // Throws where the name is no template, or the vocabulary lacks a token that it needs; source: the tokenizer's
    // file.
    ChatTemplate(const std::string& name, const Tokenizer& tokenizer, const std::string& source);
    // The one whose special tokens the vocabulary has; else plain.
    static std::string usual(const Tokenizer& tokenizer);
    static const std::vector<std::string>& names();

    // Throws where a role has no place in the template.
    EncodedConversation encode(const Conversation& conversation, WordCache& cache) const;

  private:
    struct Writer;
    void write_chatml(const Message& message, Writer& out) const;
    void write_llama3(const Message& message, Writer& out) const;
    void write_alpaca(const Message& message, Writer& out) const;
    void write_plain(const Message& message, bool joined, Writer& out) const;

    std::string name_;
    const Tokenizer& tokenizer_;
    uint32_t start_ = 0, end_ = 0;                 // of a document, of an answer
    uint32_t message_start_ = 0, header_end_ = 0;  // chatml and llama3
};
