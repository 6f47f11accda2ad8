/** The page on its own: its routes are next to it, below the token in the address. */

import { mount } from "./judgments.js";

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(`api/${path}`, options);
  } catch {
    throw new TypeError("The server of this page does not answer. Is its command still running?"); // as fetch has it
  }
  const answer = await response.json().catch(() => ({ error: { message: `status ${response.status}` } }));
  if (!response.ok) throw new Error([answer.error.message, answer.error.hint].filter(Boolean).join(": "));
  return answer;
}

const study = await mount(document.querySelector("main"), ask).start();
if (study) document.title = `${study.title}: ${study.kind}`;
