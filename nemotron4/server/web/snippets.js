/** The same request from a shell, from Python, and as the JSON that the model card's client sends. */

import { hasKey, sendJson } from "./api.js";
import { arrowKeys, tabs } from "./controls.js";
import { copyText } from "./dom.js";

const LANGUAGES = [["curl", "curl"], ["python", "Python"], ["call", "call JSON"]];

/** Shows one request to a route of the server. */
export async function showSnippets(body, info, path = "v1/chat/completions") {
  const dialog = document.getElementById("snippets");
  const list = dialog.querySelector("[role=tablist]");
  const shown = document.getElementById("snippet");
  const call = body.messages ? await cardCall(body, info) : body;
  const texts = {
    curl: curl(path === "generate" ? "PUT" : "POST", path, body),
    python: path === "generate" ? pythonGenerate(body) : pythonOpenAi(body),
    call: JSON.stringify(call, null, 2),
  };
  let chosen = "curl";
  const draw = () => {
    list.replaceChildren(...tabs(LANGUAGES, chosen, (key) => { chosen = key; draw(); }));
    shown.textContent = texts[chosen];
  };
  draw();
  if (!list.hasKeys) arrowKeys(list);
  list.hasKeys = true;
  const copy = document.getElementById("copy-snippet");
  copy.onclick = () => copyText(texts[chosen], copy);
  dialog.showModal();
}

const address = (path) => new URL(path, document.baseURI).href;
const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(method, path, body) {
  const key = hasKey() ? " \\\n  -H \"Authorization: Bearer $NEMOTRON4_API_KEY\"" : "";
  return `curl -X ${method} ${address(path)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${shellQuoted(JSON.stringify(body))}`;
}

// Every JSON text in these bodies is a Python literal too, but for the three words.
const python = (value) => JSON.stringify(value, null, 4)
  .replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g, (_, text, word) => text ?? { true: "True", false: "False", null: "None" }[word]);

function pythonOpenAi(body) {
  const own = ["model", "messages", "prompt", "logprobs", "temperature", "top_p", "max_tokens", "presence_penalty", "frequency_penalty", "seed", "stop"];
  const entries = Object.entries(body);
  const extra = Object.fromEntries(entries.filter(([name]) => !own.includes(name)));
  const lines = entries.filter(([name]) => own.includes(name)).map(([name, value]) => `    ${name}=${indent(python(value))},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${indent(python(extra))},`);
  const key = hasKey() ? 'os.environ["NEMOTRON4_API_KEY"]' : '"none"';
  return `${hasKey() ? "import os\n\n" : ""}import openai

client = openai.OpenAI(base_url="${address("v1")}", api_key=${key})
answer = client.${body.messages ? "chat.completions" : "completions"}.create(
${lines.join("\n")}
)
print(answer.choices[0].${body.messages ? "message.content" : "text"})`;
}

function pythonGenerate(body) {
  const headers = hasKey() ? ', headers={"Authorization": f"Bearer {os.environ[\'NEMOTRON4_API_KEY\']}"}' : "";
  return `${hasKey() ? "import os\n\n" : ""}import requests

call = ${python(body)}
answer = requests.put("${address("generate")}", json=call${headers}).json()
print(answer["sentences"][0][len(call["sentences"][0]) :])`;
}

const indent = (text) => text.replaceAll("\n", "\n    ");

/** The chat as the card's client would send it: the card's template around the turns, NeMo's names of the fields. */
async function cardCall(body, info) {
  const { prompt } = await sendJson("page/prompt", { messages: body.messages });
  const isGreedy = body.temperature === 0;
  return {
    sentences: [prompt],
    tokens_to_generate: body.max_tokens ?? 1024,
    temperature: isGreedy ? 1.0 : body.temperature ?? 1.0,
    add_BOS: false,
    top_k: body.top_k ?? 0,
    top_p: body.top_p ?? 1.0,
    greedy: isGreedy,
    all_probs: false,
    repetition_penalty: Math.max(1, body.repetition_penalty ?? 1.0),
    min_tokens_to_generate: 1,
    end_strings: [...info.card.end_strings, ...(body.stop ?? [])],
    ...(body.seed !== undefined && { random_seed: body.seed }),
  };
}
