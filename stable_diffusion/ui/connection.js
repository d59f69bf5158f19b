/** Tells a server that cannot be reached from mistakes of this page: a browser has the same error for both. */

export class Unreachable extends Error {}

/** What `asking` (a promise of the network) gives. Raises Unreachable, or AbortError where it was ended from here. */
export async function reached(asking) {
  try {
    return await asking;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable(error.message);
  }
}
