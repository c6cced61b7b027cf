// What nybl.hpp promises: owners, results, ranges.
#include "nybl.hpp"

#include <cstring>
#include <iostream>
#include <memory>
#include <stdexcept>

static int failures;

#define EXPECT(condition) \
    ((condition) ? void() : (void)(std::cerr << "line " << __LINE__ << ", not so: " #condition "\n", failures++))

static std::string story(nybl::session &session, std::size_t most)
{
    std::string text;
    auto range = session.tokens(most);
    for (const nybl::event &event : range)
        text += event.text;
    EXPECT(range.status());
    return text;
}

static void results(const nybl::runtime &runtime)
{
    auto missing = nybl::model::open(runtime, "/nowhere");
    EXPECT(!missing && missing.error().status == NYBL_ERR_IO);
    EXPECT(missing.error().text.find("/nowhere") != std::string::npos);
    EXPECT(std::strcmp(missing.error().name(), "NYBL_ERR_IO") == 0);
    try {
        std::move(missing).value();
        EXPECT(!"value() of a failure returned");
    } catch (const nybl::failure &failure) {
        EXPECT(failure.error().status == NYBL_ERR_IO);
    }
    EXPECT(nybl::result<int>(nybl::error{NYBL_ERR_IO, ""}).value_or(7) == 7);
    EXPECT(nybl::result<int>(3).and_then([](int x) { return nybl::result<int>(x + 1); }).value() == 4);
    auto config = nybl::sized<nybl_runtime_config>();
    config.threads = 1000000;
    EXPECT(nybl::runtime::create(config).error().status == NYBL_ERR_INVALID_ARGUMENT);
    static_assert(!std::is_copy_constructible_v<nybl::session>, "a session has one owner");
    static_assert(std::is_nothrow_move_constructible_v<nybl::session>, "and may be given away");
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    auto runtime = std::make_unique<nybl::runtime>(nybl::runtime::create().value());
    results(*runtime);

    auto model = nybl::model::open(*runtime, argv[1]).value();
    nybl::model copy = model;
    EXPECT(copy.get() != model.get() && copy.info()->vocab == model.info()->vocab);
    auto ids = model.tokenize("Once upon a time").value();
    EXPECT(model.detokenize(ids).value() == "Once upon a time");
    EXPECT(model.tokenize("").value().size() <= 1);

    auto session = nybl::session::create(copy).value();
    copy = model;
    runtime.reset(); // handles keep what they need
    EXPECT(session.append(ids));
    auto whole = story(session, 40);
    EXPECT(whole.size() > 50);

    // Twice 20, a range left early, and a callback give the same text as 40 at once.
    EXPECT(session.truncate(ids.size()));
    std::string halves = story(session, 20);
    halves += story(session, 20);
    EXPECT(halves == whole);
    session.reset().value();
    session.append(ids).value();
    std::string parts;
    for (const nybl::event &event : session.tokens()) {
        parts += event.text;
        break;
    }
    std::size_t count = 1;
    EXPECT(session.generate(0, [&](const nybl::event &event) {
        parts += event.text;
        return ++count < 40;
    }));
    EXPECT(parts == whole && count == 40);

    // Sessions that decode together say what each says alone.
    std::vector<nybl::session> both;
    for (const char *prompt : {"Once upon a time", "The dog"}) {
        both.push_back(nybl::session::create(model).value());
        both.back().append(model.tokenize(prompt).value()).value();
    }
    auto batch = nybl::batch::create(both[0], 2).value();
    std::string texts[2];
    for (int i = 0; i < 40; i++) {
        EXPECT(batch.decode(both).value() == (i > 0 ? 2 : 0));
        for (int k = 0; k < 2; k++)
            texts[k] += both[k].next().value().text;
    }
    both[1].reset().value();
    both[1].append(model.tokenize("The dog").value()).value();
    EXPECT(texts[0] == whole && texts[1] == story(both[1], 40));
    EXPECT(batch.decode(std::vector<nybl::session>()).value() == 0);

    try {
        (void)session.generate(0, [](const nybl::event &) -> bool { throw std::logic_error("mine"); });
        EXPECT(!"the exception is lost");
    } catch (const std::logic_error &mine) {
        EXPECT(std::strcmp(mine.what(), "mine") == 0);
    }
    auto logits = session.logits().value();
    EXPECT(logits.size() == model.info()->vocab && logits.begin() != logits.end());
    auto moved = std::move(session);
    EXPECT(!session.get() && moved.next());
    moved.reset().value();
    auto empty = moved.tokens();
    EXPECT(empty.begin() == empty.end() && empty.status().error().status == NYBL_ERR_INVALID_ARGUMENT);

    if (failures == 0)
        std::cout << "all as documented\n";
    return failures != 0;
}
