// Talks: every line of input is appended to the sequence and answered with what the model makes of it.
//
//   c++ -std=c++17 chat.cpp -lnybl && ./a.out MODEL [TOKENS]
#include "nybl.hpp"

#include <iostream>

int main(int argc, char **argv)
try {
    if (argc < 2)
        return std::cerr << "usage: " << argv[0] << " MODEL [TOKENS]\n", 2;
    const std::size_t most = argc > 2 ? std::stoul(argv[2]) : 60;

    auto runtime = nybl::runtime::create().value();
    auto model = nybl::model::open(runtime, argv[1]).value();
    auto session = nybl::session::create(model).value();
    std::uint32_t flags = NYBL_TOKENIZE_ADD_SPECIAL; // the sequence begins once

    for (std::string line; std::cout << "> " << std::flush, std::getline(std::cin, line);) {
        auto added = session.append(model.tokenize(line, flags).value());
        if (!added && added.error().status == NYBL_ERR_CONTEXT_FULL) {
            std::cout << "(that is all I can keep in mind: beginning anew)\n";
            session.reset().value();
            flags = NYBL_TOKENIZE_ADD_SPECIAL;
            continue;
        }
        added.value();
        flags = 0;
        auto answer = session.tokens(most);
        for (const nybl::event &event : answer)
            std::cout << event.text << std::flush;
        answer.status().value();
        std::cout << '\n';
    }
    std::cout << '\n';
} catch (const nybl::failure &failure) {
    std::cerr << failure.what() << '\n';
    return 1;
}
