package io.nybl

import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn

/**
 * Adds [prompt] to the sequence when it is collected, and emits what follows as it comes. It computes on the threads
 * of [Dispatchers.Default]; to stop collecting, or to cancel the collector, stops it after the token it is at.
 */
fun Session.generate(prompt: String): Flow<String> = flow {
    append(prompt)
    while (true) {
        // emit() is where a cancelled collector leaves.
        emit(next() ?: break)
    }
}.flowOn(Dispatchers.Default)
