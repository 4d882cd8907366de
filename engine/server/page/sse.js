// Server-sent events of a response to a POST, which EventSource cannot make.
// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

import { reach } from "./api.js";

/** Yields the data of each event. `body` is a ReadableStream of bytes, cut anywhere. */
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reach(reader.read());
      if (done) return; // what no blank line ends is not an event
      // A "\r" at the end may be the first half of "\r\n".
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line === "data" || line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}
