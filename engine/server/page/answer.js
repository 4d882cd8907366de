// One answer to a conversation, as it comes.

import { call, ServerError } from "./api.js";
import { eventData } from "./sse.js";

/**
 * Asks for an answer and calls `show(text, facts)` with each piece of it and what is known of it so far.
 *
 * facts: tokens, seconds to the first one, tokens a second after it, and in the end the reason for it.
 * ServerError where it fails; AbortError where `signal` ends it, which ends it in the engine too.
 */
export async function streamAnswer(body, signal, show) {
  const started = performance.now();
  const facts = { tokens: 0, firstToken: null, perSecond: null, reason: null };
  let first, last;
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(0, event.error.message);
    if (event.usage) facts.tokens = event.usage.completion_tokens;
    const [choice] = event.choices;
    if (!choice || choice.delta.role) {
      show("", facts);
      continue; // the usage, or the beginning, which comes with the first token's own event
    }
    last = performance.now();
    first ??= last;
    facts.tokens += 1;
    facts.firstToken = (first - started) / 1000;
    if (last > first) facts.perSecond = ((facts.tokens - 1) * 1000) / (last - first);
    facts.reason = choice.finish_reason;
    show(choice.delta.content, facts);
  }
  throw new ServerError(0, "The connection ended before the answer did.");
}
