// Requests to the server that this page came from.

const KEY = "micro-vllm API key";

/** Dispatches "needed" when the server refuses the key, or that there is none. */
export const key = new (class extends EventTarget {
  get value() {
    return sessionStorage.getItem(KEY); // gone with the tab
  }

  set value(value) {
    sessionStorage.setItem(KEY, value);
  }
})();

/** What the server or the connection to it says is wrong. `status` is 0 where there is no answer. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The response; ServerError where it is not a good one. */
export async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.value !== null) headers.set("Authorization", `Bearer ${bytes(key.value)}`);
  const response = await reach(fetch(path, { ...options, headers, cache: "no-store" }));
  if (response.ok) return response;
  if (response.status === 401) key.dispatchEvent(new Event("needed"));
  throw new ServerError(response.status, await reason(response));
}

/** The result of a part of fetch; ServerError where the connection fails. */
export async function reach(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with ${response.status}.`;
  }
}

/** A header holds bytes, one a character. */
function bytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}
