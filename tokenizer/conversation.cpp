#include "conversation.h"

#include <algorithm>
#include <optional>

#include "json_text.h"
#include "trainer/files.h"

// ---------------------------------------------------------------------------------------------------------------------
// Reading

namespace {

std::string_view get(const JsonFields& fields, const std::string& name, const std::string& where = "") {
    if (const auto value = find_field(fields, name)) return *value;
    throw JsonError(where + "no field \"" + name + "\"");
}

struct Form {
    const char *question, *answer;  // fields that are there
};
constexpr Form forms[] = {
    {"messages", "messages"}, {"prompt", "completion"}, {"instruction", "output"}, {"question", "answer"}};

const Form* form_of(const JsonFields& fields) {
    const auto has = [&](const Form& form) {
        return find_field(fields, form.question) && find_field(fields, form.answer);
    };
    const auto found = std::find_if(std::begin(forms), std::end(forms), has);
    return found == std::end(forms) ? nullptr : found;
}

std::vector<Message> read_messages(std::string_view list, const std::string& name, bool may_answer) {
    std::vector<Message> messages;
    for (const std::string_view element : json_elements(list, "\"" + name + "\"")) {
        const std::string where = "\"" + name + "\", entry " + std::to_string(messages.size() + 1) + ": ";
        if (!element.starts_with('{')) throw JsonError(where + "expected an object with \"role\" and \"content\"");
        const JsonFields fields = json_fields(element);
        Message message = {.role = json_string(get(fields, "role", where), where + "\"role\""),
                           .content = json_string(get(fields, "content", where), where + "\"content\"")};
        message.is_answer = may_answer && message.role == "assistant";
        messages.push_back(std::move(message));
    }
    return messages;
}

}  // namespace

Conversation read_conversation(std::string_view json) {
    const JsonFields fields = json_fields(json);
    const Form* form = form_of(fields);
    if (!form) {
        std::string found;
        for (const auto& [name, value] : fields) found += (found.empty() ? "\"" : ", \"") + name + "\"";
        throw JsonError(
            "no conversation: expected \"messages\", or \"prompt\" and \"completion\", or \"instruction\" and "
            "\"output\", or \"question\" and \"answer\", found " +
            (found.empty() ? "no field" : found));
    }
    const std::string question = form->question, answer = form->answer;
    Conversation conversation;
    if (question == answer) {
        conversation.messages = read_messages(get(fields, question), question, true);
    } else if (get(fields, question).starts_with('[')) {
        conversation.messages = read_messages(get(fields, question), question, false);
        for (Message& message : read_messages(get(fields, answer), answer, true))
            conversation.messages.push_back(std::move(message));
    } else {
        const auto string = [&](const std::string& name) { return json_string(get(fields, name), "\"" + name + "\""); };
        const bool has_input = question == "instruction" && find_field(fields, "input").value_or("null") != "null";
        conversation.messages = {
            {.role = "user", .content = string(question), .input = has_input ? string("input") : ""},
            {.role = "assistant", .content = string(answer), .is_answer = true}};
        conversation.joined = question == "prompt";
    }
    return conversation;
}

bool is_conversation(std::string_view json, const std::string& field) try {
    const JsonFields fields = json_fields(json);
    return !find_field(fields, field) && form_of(fields);
} catch (const JsonError&) {
    return false;
}

std::string Conversation::text() const {
    std::string all;
    for (const Message& message : messages) all += message.content + message.input;
    return all;
}

bool Conversation::has_answer() const {
    return std::any_of(messages.begin(), messages.end(), [](const Message& message) { return message.is_answer; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Templates

// Text and tokens, one after the other. Neighbouring texts are encoded as one, but for where an answer begins.
struct ChatTemplate::Writer {
    const Tokenizer& tokenizer;
    WordCache& cache;
    EncodedConversation out = {};
    std::string waiting = {};

    void text(std::string_view more) { waiting += more; }
    void token(uint32_t id) {
        flush();
        out.tokens.push_back(id);
    }
    void flush() {
        tokenizer.encode(waiting, Special::as_text, cache, out.tokens);
        waiting.clear();
    }
    // What the message says, and the token that ends it.
    void content(const Message& message, std::string_view content, uint32_t end) {
        if (message.is_answer) flush();
        const size_t begin = out.tokens.size();
        text(content);
        token(end);
        if (message.is_answer) out.answers.push_back({begin, out.tokens.size()});
    }
};

const std::vector<std::string>& ChatTemplate::names() {
    static const std::vector<std::string> all = {"chatml", "llama3", "alpaca", "plain"};
    return all;
}

std::string ChatTemplate::usual(const Tokenizer& tokenizer) {
    const auto has = [&](const char* token) { return tokenizer.added_tokens.contains(token); };
    if (has("<|im_start|>") && has("<|im_end|>")) return "chatml";
    if (has("<|start_header_id|>") && has("<|end_header_id|>") && has("<|eot_id|>")) return "llama3";
    return "plain";
}

ChatTemplate::ChatTemplate(const std::string& name, const Tokenizer& tokenizer, const std::string& source)
    : name_(name), tokenizer_(tokenizer), start_(tokenizer.document_start.value()) {
    const auto id_of = [&](const char* token) {
        const auto found = tokenizer.added_tokens.find(token);
        if (found != tokenizer.added_tokens.end()) return found->second;
        fail(source, std::string("no token ") + token + ", which --template " + name +
                         " needs; add it by tokenize train --special, or take --template alpaca or plain");
    };
    if (name == "chatml") {
        message_start_ = id_of("<|im_start|>");
        end_ = id_of("<|im_end|>");
    } else if (name == "llama3") {
        message_start_ = id_of("<|start_header_id|>");
        header_end_ = id_of("<|end_header_id|>");
        end_ = id_of("<|eot_id|>");
    } else if (name == "alpaca" || name == "plain") {
        if (!tokenizer.end_of_text)
            fail(source, "no added token <|endoftext|> or <|end_of_text|> to end answers with; add one to the file");
        end_ = *tokenizer.end_of_text;
    } else {
        fail("--template " + name, "must be one of chatml, llama3, alpaca, plain");
    }
}

void ChatTemplate::write_chatml(const Message& message, Writer& out) const {
    out.token(message_start_);
    out.text(message.role + "\n");
    out.content(message, message.content, end_);
    out.text("\n");
}

void ChatTemplate::write_llama3(const Message& message, Writer& out) const {
    out.token(message_start_);
    out.text(message.role);
    out.token(header_end_);
    out.text("\n\n");
    out.content(message, strip(message.content), end_);
}

// A system's message takes the place of the sentences that introduce the task.
void ChatTemplate::write_alpaca(const Message& message, Writer& out) const {
    const bool first = out.out.tokens.size() == 1 && out.waiting.empty();
    if (message.role == "assistant") {
        out.text("### Response:\n");
        return out.content(message, message.content, end_);
    }
    if (message.role == "system") return out.text(message.content + "\n\n");
    if (message.role != "user") {
        throw JsonError("the role \"" + message.role +
                        "\" has no place in --template alpaca: expected system, user or assistant");
    }
    if (first) {
        out.text("Below is an instruction that describes a task");
        if (!message.input.empty()) out.text(", paired with an input that provides further context");
        out.text(". Write a response that appropriately completes the request.\n\n");
    } else if (out.waiting.empty()) {  // behind an answer
        out.text("\n\n");
    }
    out.text("### Instruction:\n" + message.content + "\n\n");
    if (!message.input.empty()) out.text("### Input:\n" + message.input + "\n\n");
}

void ChatTemplate::write_plain(const Message& message, bool joined, Writer& out) const {
    if (message.role == "assistant") out.content(message, message.content, end_);
    else out.text(message.content + (joined ? "" : "\n"));
}

EncodedConversation ChatTemplate::encode(const Conversation& conversation, WordCache& cache) const {
    Writer out{tokenizer_, cache};
    out.token(start_);
    for (Message message : conversation.messages) {
        if (name_ != "alpaca" && !message.input.empty()) message.content += "\n" + message.input;
        if (name_ == "chatml") write_chatml(message, out);
        else if (name_ == "llama3") write_llama3(message, out);
        else if (name_ == "alpaca") write_alpaca(message, out);
        else write_plain(message, conversation.joined, out);
    }
    out.flush();
    return std::move(out.out);
}
