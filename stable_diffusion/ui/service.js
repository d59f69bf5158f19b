/** What is asked of the server: what it can do, and images. Knows nothing of the page. */

import { reached } from "./connection.js";
import { eventsOf } from "./events.js";

/** What the server has refused or failed to do. `problems` name the fields: [{field, message}]. */
export class Refused extends Error {
  constructor({ message, problems }) {
    super(message);
    this.problems = problems ?? [];
  }
}

/** What the server says of itself: `fields` has the limits and defaults of each, `schedulers` their names. Raises Unreachable or Error. */
export async function readCapabilities() {
  const answer = await reached(fetch("../capabilities"));
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.json();
}

/**
 * Have one image generated: from text, from `image` (Blob), or where there is a `mask` (Blob) in that part of it.
 * Yields {name, data} of the server's events until the image is there; aborting `signal` cancels it.
 * Raises Refused, Unreachable or AbortError.
 */
export async function* generate(settings, { image, mask }, signal) {
  const headers = { Accept: "text/event-stream, image/png" };
  let path = "../txt2img";
  let body = JSON.stringify(settings);
  if (image) {
    path = mask ? "../inpaint" : "../img2img";
    const form = new FormData();
    form.append("img", image, "image");
    if (mask) form.append("mask", mask, "mask.png");
    form.append("data", body);
    body = form;
  } else {
    headers["Content-Type"] = "application/json";
  }
  const answer = await reached(fetch(path, { method: "POST", headers, body, signal }));
  if (!answer.ok) throw await refusalIn(answer);
  for await (const { name, data } of eventsOf(answer.body)) {
    const content = JSON.parse(data);
    if (name === "error") throw new Refused(content.error);
    yield { name, data: content };
    if (name === "completed") return;
  }
  throw new Refused({ message: "The connection ended before the image was ready. Try again." });
}

async function refusalIn(answer) {
  try {
    return new Refused((await answer.json()).error);
  } catch { // a proxy on the way, which has errors of its own
    return new Refused({ message: `The server answered ${answer.status} ${answer.statusText}`.trim() + "." });
  }
}

/** An image as events carry it. */
export function blobOf({ image, media_type }) {
  const bytes = atob(image);
  const content = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) content[i] = bytes.charCodeAt(i);
  return new Blob([content], { type: media_type });
}
