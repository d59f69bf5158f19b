/**
 * Server-sent events read from the body of a fetch, as the HTML standard has them (section 9.2).
 * EventSource cannot send a POST. Knows nothing of what the events say.
 */

import { reached } from "./connection.js";

/** Yields {name, data} of each event, data as text. An event that is cut off at the end is dropped. Raises as `reached`. */
export async function* eventsOf(body) {
  let name = "message";
  let data = [];
  for await (const line of linesOf(body)) {
    if (line === "") {
      if (data.length) yield { name, data: data.join("\n") };
      name = "message";
      data = [];
    } else if (!line.startsWith(":")) { // else a comment, which keeps the connection open
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "event") name = value;
      else if (field === "data") data.push(value);
    }
  }
}

/** Whole lines, which end with CR LF, LF or CR, wherever the pieces are cut. */
async function* linesOf(body) {
  const reader = body.getReader(); // Safari cannot iterate over a stream
  const decoder = new TextDecoder();
  let begun = "";
  let afterReturn = false;
  try {
    for (;;) {
      const { done, value } = await reached(reader.read());
      if (done) return;
      let text = decoder.decode(value, { stream: true });
      if (!text) continue;
      if (afterReturn && text.startsWith("\n")) text = text.slice(1); // the second half of a CR LF
      if (text) afterReturn = text.endsWith("\r");
      else { afterReturn = false; continue; }
      const lines = text.split(/\r\n|\n|\r/);
      lines[0] = begun + lines[0];
      begun = lines.pop();
      yield* lines;
    }
  } finally {
    await reader.cancel().catch(() => {}); // it has failed already where the request was cancelled
  }
}
