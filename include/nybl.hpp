// nybl for C++17: nybl.h with owners instead of handles, results instead of out-parameters, and ranges of tokens.
//
//   auto runtime = nybl::runtime::create().value();
//   auto model = nybl::model::open(runtime, "model.nybl").value();
//   auto session = nybl::session::create(model).value();
//   session.append(model.tokenize("Once upon a time").value()).value();
//   for (const nybl::event &event : session.tokens(100))
//       std::cout << event.text;
//
// Header only, over the C functions and nothing else: everything here is inline, and whatever is not wrapped
// can be called through get(). Works with and without exceptions: value() of a failure throws nybl::failure, or
// ends the program under -fno-exceptions. No function but value() throws for a failure of the library.
#ifndef NYBL_HPP
#define NYBL_HPP

#include "nybl.h"

#include <cstdlib>
#include <exception>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace nybl {

// Why a call failed: its status and the words of nybl_last_error().
struct error {
    nybl_status status = NYBL_OK;
    std::string text;

    const char *name() const noexcept { return nybl_status_name(status); }

    // The error of the call that this thread has just made.
    static error last(nybl_status status)
    {
        error error{status, std::string(nybl_last_error(nullptr, 0) + 1, '\0')};
        error.text.resize(nybl_last_error(&error.text[0], error.text.size()));
        return error;
    }
};

// What value() of a failure throws.
class failure : public std::runtime_error {
public:
    explicit failure(nybl::error error)
        : std::runtime_error(std::string(error.name()) + ": " + error.text), error_(std::move(error)) {}
    const nybl::error &error() const noexcept { return error_; }

private:
    nybl::error error_;
};

// A value or an error, after std::expected<T, nybl::error>.
template <class T> class [[nodiscard]] result {
    // void takes the place of nothing.
    using held = std::conditional_t<std::is_void_v<T>, std::monostate, T>;

public:
    using value_type = T;
    using error_type = nybl::error;

    result(held value = held()) : state_(std::in_place_index<0>, std::move(value)) {}
    result(nybl::error error) : state_(std::in_place_index<1>, std::move(error)) {}

    bool has_value() const noexcept { return state_.index() == 0; }
    explicit operator bool() const noexcept { return has_value(); }
    const nybl::error &error() const { return *std::get_if<1>(&state_); }

    held &value() & { return check(), *std::get_if<0>(&state_); }
    const held &value() const & { return check(), *std::get_if<0>(&state_); }
    held value() && { return check(), std::move(*std::get_if<0>(&state_)); }
    held &operator*() & { return *std::get_if<0>(&state_); }
    const held &operator*() const & { return *std::get_if<0>(&state_); }
    held *operator->() { return std::get_if<0>(&state_); }
    const held *operator->() const { return std::get_if<0>(&state_); }

    template <class U> held value_or(U &&otherwise) &&
    {
        return has_value() ? std::move(*std::get_if<0>(&state_)) : held(std::forward<U>(otherwise));
    }

    // The result of `next` for a value, or the error there is.
    template <class F> auto and_then(F &&next) && -> std::invoke_result_t<F, held>
    {
        if (!has_value())
            return error();
        return std::forward<F>(next)(std::move(*std::get_if<0>(&state_)));
    }

private:
    void check() const
    {
        if (has_value())
            return;
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
        throw failure(error());
#else
        std::abort();
#endif
    }

    std::variant<held, nybl::error> state_;
};

// A struct of the header with its size set and every other field at its default.
template <class T> T sized() noexcept
{
    T value{};
    value.struct_size = sizeof value;
    return value;
}

// The one owner of a handle of the C interface.
template <class T, void (*Destroy)(T *)> class owner {
public:
    owner() noexcept = default;
    explicit owner(T *handle) noexcept : handle_(handle) {}
    owner(owner &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    owner &operator=(owner &&other) noexcept
    {
        if (this != &other)
            reset(std::exchange(other.handle_, nullptr));
        return *this;
    }
    ~owner() { Destroy(handle_); }

    T *get() const noexcept { return handle_; }
    T *release() noexcept { return std::exchange(handle_, nullptr); }
    void reset(T *handle = nullptr) noexcept { Destroy(std::exchange(handle_, handle)); }
    explicit operator bool() const noexcept { return handle_ != nullptr; }

private:
    T *handle_ = nullptr;
};

inline result<void> check(nybl_status status)
{
    if (status != NYBL_OK)
        return error::last(status);
    return {};
}

// Values that lie elsewhere.
template <class T> class view {
public:
    view(const T *data, std::size_t size) noexcept : data_(data), size_(size) {}
    const T *data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }
    const T *begin() const noexcept { return data_; }
    const T *end() const noexcept { return data_ + size_; }
    const T &operator[](std::size_t i) const noexcept { return data_[i]; }

private:
    const T *data_;
    std::size_t size_;
};

// Threads, kernels and memory. Any thread may use it.
class runtime {
public:
    static result<runtime> create(const nybl_runtime_config &config = sized<nybl_runtime_config>())
    {
        nybl_runtime *handle = nullptr;
        if (nybl_status status = nybl_runtime_create(&config, &handle))
            return error::last(status);
        return runtime(handle);
    }
    nybl_runtime *get() const noexcept { return handle_.get(); }

private:
    explicit runtime(nybl_runtime *handle) : handle_(handle) {}
    owner<nybl_runtime, nybl_runtime_destroy> handle_;
};

// An opened model; a copy is another handle to the same one. Any thread may use it.
class model {
public:
    static result<model> open(const runtime &runtime, std::string_view path)
    {
        nybl_model *handle = nullptr;
        if (nybl_status status = nybl_model_open(runtime.get(), path.data(), path.size(), &handle))
            return error::last(status);
        return model(handle);
    }
    model(const model &other) : handle_(nybl_model_retain(other.get())) {}
    model(model &&) noexcept = default;
    model &operator=(const model &other) { return *this = model(other); }
    model &operator=(model &&) noexcept = default;

    nybl_model *get() const noexcept { return handle_.get(); }

    result<nybl_model_info> info() const
    {
        auto info = sized<nybl_model_info>();
        if (nybl_status status = nybl_model_get_info(get(), &info))
            return error::last(status);
        return info;
    }

    // `flags`: a sum of NYBL_TOKENIZE_*.
    result<std::vector<std::uint32_t>> tokenize(
        std::string_view text, std::uint32_t flags = NYBL_TOKENIZE_ADD_SPECIAL) const
    {
        std::vector<std::uint32_t> ids;
        return filled(ids, [&](std::uint32_t *to, std::size_t capacity, std::size_t *count) {
            return nybl_tokenize(get(), text.data(), text.size(), flags, to, capacity, count);
        });
    }

    result<std::string> detokenize(const std::vector<std::uint32_t> &ids) const
    {
        std::string text;
        return filled(text, [&](char *to, std::size_t capacity, std::size_t *length) {
            return nybl_detokenize(get(), ids.data(), ids.size(), to, capacity, length);
        });
    }

private:
    explicit model(nybl_model *handle) : handle_(handle) {}

    // Asks for the length, then for the content.
    template <class C, class F> static result<C> filled(C &into, F &&call)
    {
        std::size_t length = 0;
        nybl_status status = call(nullptr, 0, &length);
        if (status == NYBL_ERR_BUFFER_TOO_SMALL) {
            into.resize(length);
            status = call(&into[0], into.size(), &length);
        }
        if (status)
            return error::last(status);
        return std::move(into);
    }

    owner<nybl_model, nybl_model_release> handle_;
};

// What generating came to; `text` is valid until the next call on the session.
struct event {
    std::int32_t kind = 0;
    std::uint32_t token = 0;
    std::string_view text;

    bool is_token() const noexcept { return kind == NYBL_EVENT_TOKEN; }
};

class session;

// The events of a session, made as the loop goes: tokens, then perhaps the one that says why there are no more.
// Leaving the loop early is fine, and so is another range afterwards. What ended it otherwise is in status().
class tokens {
public:
    class iterator {
    public:
        using iterator_category = std::input_iterator_tag;
        using value_type = event;
        using difference_type = std::ptrdiff_t;
        using pointer = const event *;
        using reference = const event &;

        reference operator*() const { return range_->event_; }
        pointer operator->() const { return &range_->event_; }
        iterator &operator++()
        {
            if (!range_->step())
                range_ = nullptr;
            return *this;
        }
        void operator++(int) { ++*this; }
        friend bool operator==(const iterator &a, const iterator &b) { return a.range_ == b.range_; }
        friend bool operator!=(const iterator &a, const iterator &b) { return a.range_ != b.range_; }

    private:
        friend class tokens;
        explicit iterator(tokens *range) : range_(range) {}
        tokens *range_;
    };

    iterator begin() { return iterator(step() ? this : nullptr); }
    iterator end() { return iterator(nullptr); }
    const result<void> &status() const { return status_; }

private:
    friend class session;
    tokens(nybl_session *session, std::size_t most) : session_(session), left_(most) {}

    bool step()
    {
        if (left_ == 0 || !status_ || (event_.kind != 0 && !event_.is_token()))
            return false;
        auto made = sized<nybl_event>();
        status_ = check(nybl_session_next(session_, &made));
        if (!status_)
            return false;
        left_--;
        event_ = {made.kind, made.token, {made.text, made.text_len}};
        return true;
    }

    nybl_session *session_;
    std::size_t left_;
    event event_;
    result<void> status_;
};

// One sequence of tokens. One thread at a time.
class session {
public:
    static result<session> create(const model &model,
                                  const nybl_session_config &config = sized<nybl_session_config>())
    {
        nybl_session *handle = nullptr;
        if (nybl_status status = nybl_session_create(model.get(), &config, &handle))
            return error::last(status);
        return session(handle);
    }
    nybl_session *get() const noexcept { return handle_.get(); }

    result<void> append(const std::vector<std::uint32_t> &ids)
    {
        return check(nybl_session_append(get(), ids.data(), ids.size()));
    }

    result<event> next()
    {
        auto made = sized<nybl_event>();
        if (nybl_status status = nybl_session_next(get(), &made))
            return error::last(status);
        return event{made.kind, made.token, {made.text, made.text_len}};
    }

    // At most `most` events, as a range.
    nybl::tokens tokens(std::size_t most = static_cast<std::size_t>(-1)) { return {get(), most}; }

    // Calls `each(const event &)`, which returns whether to go on, for at most `most` events (0: no limit). What
    // it throws comes out of here.
    template <class F> result<void> generate(std::size_t most, F &&each)
    {
        struct call {
            std::remove_reference_t<F> *each;
            std::exception_ptr thrown;
        } call{&each, nullptr};
        nybl_event_fn pass = [](void *context, const nybl_event *made) -> std::int32_t {
            auto *call = static_cast<struct call *>(context);
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
            try {
                return !(*call->each)(event{made->kind, made->token, {made->text, made->text_len}});
            } catch (...) {
                call->thrown = std::current_exception();
                return 1;
            }
#else
            return !(*call->each)(event{made->kind, made->token, {made->text, made->text_len}});
#endif
        };
        nybl_status status = nybl_session_generate(get(), most, pass, &call);
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
        if (call.thrown)
            std::rethrow_exception(call.thrown);
#endif
        return check(status);
    }

    result<void> truncate(std::size_t count) { return check(nybl_session_truncate(get(), count)); }
    result<void> reset() { return check(nybl_session_reset(get())); }

    // One float for each token of the vocabulary, valid until the next call on the session.
    result<view<float>> logits()
    {
        const float *data = nullptr;
        std::size_t count = 0;
        if (nybl_status status = nybl_session_get_logits(get(), &data, &count))
            return error::last(status);
        return view<float>(data, count);
    }

private:
    explicit session(nybl_session *handle) : handle_(handle) {}
    owner<nybl_session, nybl_session_destroy> handle_;
};

// Passes over several sessions, which read the weights once for all of them. One thread at a time.
class batch {
public:
    // For up to `most` sessions in a pass, of the same model and settings of the KV cache as `like`.
    static result<batch> create(const session &like, std::uint32_t most)
    {
        nybl_batch *handle = nullptr;
        if (nybl_status status = nybl_batch_create(like.get(), most, &handle))
            return error::last(status);
        return batch(handle);
    }
    nybl_batch *get() const noexcept { return handle_.get(); }

    // Computes what the next call of next() on each of a range of sessions chooses from. How many took part.
    template <class Sessions> result<std::size_t> decode(const Sessions &sessions)
    {
        std::vector<nybl_session *> handles;
        for (const session &each : sessions)
            handles.push_back(each.get());
        std::size_t computed = 0;
        if (nybl_status status = nybl_batch_decode(get(), handles.data(), handles.size(), &computed))
            return error::last(status);
        return computed;
    }

private:
    explicit batch(nybl_batch *handle) : handle_(handle) {}
    owner<nybl_batch, nybl_batch_destroy> handle_;
};

} // namespace nybl

#endif // NYBL_HPP
