package io.nybl

import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.joinAll
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking

/** Flows over a real library and model: FlowTest MODEL. */
fun main(arguments: Array<String>) = runBlocking {
    val config = LlmConfig.Builder()
        .setModelPath(arguments[0])
        .setExecutionPriority(ExecutionPriority.INTERACTIVE)
        .setContextWindow(200)
        .build()
    Llm.open(config).use { llm ->
        val whole = llm.newSession().use { it.generate("Once upon a time").toList().joinToString("") }
        check(whole.length > 50) { whole }
        llm.newSession().use { session ->
            val begun = session.generate("Once upon a time").take(5).toList().joinToString("")
            check(whole.startsWith(begun)) { begun }
        }
        // 200 collectors, each cancelled a moment after it began.
        List(200) { index ->
            launch {
                llm.newSession().use { session ->
                    val collector = launch { session.generate("Once upon a time").collect { } }
                    delay(index % 5L)
                    collector.cancelAndJoin()
                }
            }
        }.joinAll()
        println("Kotlin ${KotlinVersion.CURRENT}: all as documented")
    }
}
