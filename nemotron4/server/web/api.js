/** Requests to the server that this page came from, with the key that it may ask for. */

const KEY = "nemotron4.key";

export class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Headers of every request; the key lives as long as the tab. */
function headers(hasBody) {
  const key = sessionStorage.getItem(KEY);
  return { ...(hasBody && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

let asking = null;

/** Asks the user once, however many requests were refused meanwhile. */
function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask-key");
    document.getElementById("ask-key-wrong").hidden = !wasWrong;
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, document.getElementById("key").value.trim());
      document.getElementById("key").value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/**
 * The response, once its status is good. Paths are relative, so that a proxy may put the page in a folder.
 * @throws {RequestError} with the server's own words
 */
export async function request(path, { method = "GET", body, signal } = {}) {
  const options = { method, signal, body: body === undefined ? undefined : JSON.stringify(body) };
  for (;;) {
    const sent = headers(body !== undefined);
    let response;
    try {
      response = await fetch(path, { ...options, headers: sent });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new RequestError("The server does not answer. Is it still running?", 0);
    }
    if (response.ok) return response;
    const text = await response.text();
    // The login of a page with a port of its own is the browser's business.
    if (response.status !== 401 || !(response.headers.get("WWW-Authenticate") ?? "").startsWith("Bearer")) {
      throw new RequestError(words(text) || `HTTP ${response.status}`, response.status);
    }
    await askForKey("Authorization" in sent);
  }
}

export const getJson = async (path) => (await request(path)).json();
export const sendJson = async (path, body, options = {}) => (await request(path, { method: "POST", body, ...options })).json();

/** What an error says, in any of the server's forms. */
function words(text) {
  try {
    const value = JSON.parse(text);
    if (typeof value === "string") return value;
    return value.error?.message ?? value.message ?? text;
  } catch {
    return text.slice(0, 300);
  }
}

/** The JSON objects of a server-sent stream. Throws what the stream itself reports, and when it ends too early. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new RequestError("The connection ended before the answer was whole.", 0);
      const lines = (pending + value).split("\n");
      pending = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice(6).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new RequestError(event.error.message, 200);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
