/**
 * What a conversation is. A lane is one model with one group of settings; side by side there are two, and each
 * goes on from its own answers. A turn is what the user said and, in each lane, every answer to it. `turns` is the
 * path on screen. Where a turn was edited or answered again in the middle, its fork keeps the other paths from
 * there on; the shown one is null in `paths`.
 *
 * @typedef {{id: string, text: string, tokens: Token[], finish: string | null, error: string | null, model: string,
 *   settings: string, numTokens: number | null, seconds: number, score: Score | null,
 *   scoreError?: string}} Answer
 * @typedef {{answers: Answer[], shown: number}} LaneAnswers
 * @typedef {{paths: (Turn[] | null)[], shown: number}} Fork
 * @typedef {{id: string, user: string, lanes: LaneAnswers[], fork?: Fork}} Turn
 * @typedef {{model: string, isOther: boolean, system: string, values: Record<string, string>, stop: string,
 *   schema?: string}} Lane
 * @typedef {{id: string, title: string, draft: string, updated: number, lanes: Lane[], turns: Turn[]}} Conversation
 * @typedef {{text: string, logprob: number, top: {text: string, logprob: number}[]}} Token
 * @typedef {{attributes: Record<string, number>, reward: number | null}} Score
 */

const newId = () => `${Date.now()}-${Math.random().toString(36).slice(2)}`;

export function newLane(model, isOther = false) {
  return { model, isOther, system: "", values: {}, stop: "", schema: "" };
}

export function newConversation(lanes) {
  return { id: newId(), title: "", draft: "", updated: Date.now(), lanes: structuredClone(lanes), turns: [] };
}

/** A stored conversation in today's form: an answer that was cut off by a closed page says so. */
export function opened(stored) {
  const conversation = { draft: "", ...stored };
  for (const turn of everyTurn(conversation)) {
    turn.id ??= newId();
    for (const answer of turn.lanes.flatMap((lane) => lane.answers)) {
      answer.id ??= newId();
      if (answer.finish === null && !answer.error) answer.finish = "interrupted";
    }
  }
  return conversation;
}

function* everyTurn({ turns }) {
  for (const turn of turns) {
    yield turn;
    for (const path of turn.fork?.paths ?? []) if (path) yield* everyTurn({ turns: path });
  }
}

/** A copy with the first lane alone. */
export function firstSide(conversation) {
  const copy = newConversation(conversation.lanes.slice(0, 1));
  copy.turns = conversation.turns.map(({ user, lanes }) => ({ ...newTurn(user, 1), lanes: structuredClone(lanes.slice(0, 1)) }));
  return copy;
}

export function newTurn(user, numLanes) {
  return { id: newId(), user, lanes: Array.from({ length: numLanes }, () => ({ answers: [], shown: -1 })) };
}

export function newAnswer(lane) {
  const settings = Object.entries(lane.values).filter(([, text]) => text !== "").map(([name, text]) => `${name} ${text}`).join(", ");
  return { id: newId(), text: "", tokens: [], finish: null, error: null, model: lane.model, settings, numTokens: null, seconds: 0, score: null };
}

/** The answer that is shown, or null. */
export function shownAnswer(turn, lane) {
  return turn.lanes[lane]?.answers[turn.lanes[lane].shown] ?? null;
}

/** Whether the model said something that may stand in a prompt, a file or a judgment. */
export const isWhole = (answer) => Boolean(answer && !answer.error && answer.text.trim());

// -- Versions --------------------------------------------------------------------------------------------------

/** Puts `turn` in the place of turn `number`; what stood from there on becomes another version. */
export function branch(conversation, number, turn) {
  const old = conversation.turns.slice(number);
  const fork = old[0].fork ?? { paths: [null], shown: 0 };
  fork.paths[fork.shown] = old;
  fork.shown = fork.paths.push(null) - 1;
  delete old[0].fork;
  turn.fork = fork;
  conversation.turns.splice(number, Infinity, turn);
}

/** Shows version `wanted` of turn `number` and of what followed it. */
export function showVersion(conversation, number, wanted) {
  const { fork } = conversation.turns[number];
  const path = fork?.paths[wanted];
  if (!path) return;
  const old = conversation.turns.splice(number, Infinity, ...path);
  delete old[0].fork;
  fork.paths[fork.shown] = old;
  fork.paths[wanted] = null;
  fork.shown = wanted;
  conversation.turns[number].fork = fork;
}

/** The same turn once more, with its answers, so that another one can follow it without what came later. */
export function turnAgain(turn) {
  return { ...structuredClone({ ...turn, fork: undefined }), id: newId(), fork: undefined };
}

/**
 * Two copies of one conversation that went on apart, in two tabs: nothing of either is lost. Where both went on
 * after the same turn, theirs becomes another version.
 */
export function merged(ours, theirs) {
  const turns = mergedTurns(ours.turns, theirs.turns);
  const newer = theirs.updated > ours.updated ? theirs : ours;
  return { ...ours, title: newer.title || ours.title || theirs.title, updated: Math.max(ours.updated, theirs.updated), turns };
}

function mergedTurns(ours, theirs) {
  const same = ours.findIndex((turn, number) => turn.id !== theirs[number]?.id);
  const common = same < 0 ? ours.length : same;
  const start = ours.slice(0, common).map((turn, number) => mergedTurn(turn, theirs[number]));
  const [left, right] = [ours.slice(common), theirs.slice(common)];
  if (!left.length || !right.length) return [...start, ...left, ...right];
  const knows = (path) => left[0].fork?.paths.some((each) => each && each[0].id === path[0].id);
  if (!knows(right)) {
    left[0].fork ??= { paths: [null], shown: 0 };
    const { fork: more, ...plain } = right[0];
    left[0].fork.paths.push([plain, ...right.slice(1)]);
    for (const path of more?.paths ?? []) if (path && path[0].id !== left[0].id && !knows(path)) left[0].fork.paths.push(path);
  }
  return [...start, ...left];
}

function mergedTurn(ours, theirs) {
  const lanes = ours.lanes.map((lane, number) => {
    const known = new Map(lane.answers.map((answer) => [answer.id, answer]));
    for (const answer of theirs.lanes[number]?.answers ?? []) {
      const mine = known.get(answer.id);
      if (!mine) lane.answers.push(answer);
      else if (mine.text.length < answer.text.length) Object.assign(mine, answer);
    }
    if (lane.shown < 0) lane.shown = lane.answers.length - 1;
    return lane;
  });
  return { ...ours, lanes };
}

// -- What is sent and saved ------------------------------------------------------------------------------------

/**
 * The messages that ask for the answer of a turn in a lane; with its answer when it shall be judged. A turn whose
 * answer failed is left out: an empty message is nobody's words.
 */
export function messagesFor(conversation, turnNumber, lane, { withAnswer = false } = {}) {
  const messages = [];
  const system = conversation.lanes[lane].system.trim();
  if (system) messages.push({ role: "system", content: system });
  for (let number = 0; number <= turnNumber; number++) {
    const turn = conversation.turns[number];
    const answer = shownAnswer(turn, lane);
    const isAsked = number === turnNumber && !withAnswer;
    if (!isAsked && !isWhole(answer)) continue;
    messages.push({ role: "user", content: turn.user });
    if (!isAsked) messages.push({ role: "assistant", content: answer.text });
  }
  return messages;
}

/** The body of the chat request that asks for it. */
export function chatBody(conversation, turnNumber, lane, fields) {
  const { model, values, stop, schema } = conversation.lanes[lane];
  const body = { model, messages: messagesFor(conversation, turnNumber, lane) };
  for (const [name, text] of Object.entries(values)) {
    if (text !== "" && fields[name]) body[name] = Number(text);
  }
  const stops = stop.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  if (schema?.trim()) body.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: JSON.parse(schema) } };
  return body;
}

export function titleOf(conversation) {
  const first = conversation.title || conversation.turns[0]?.user || conversation.draft || "New conversation";
  return first.trim().split("\n")[0].slice(0, 80);
}

/** The conversation as a document for people. */
export function asMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  conversation.lanes.forEach((lane, number) => {
    if (lane.system.trim()) parts.push(`System${laneMark(conversation, number)}:\n\n${lane.system.trim()}`);
  });
  for (const turn of conversation.turns) {
    parts.push(`## User\n\n${turn.user}`);
    turn.lanes.forEach((_, number) => {
      const answer = shownAnswer(turn, number);
      if (isWhole(answer)) parts.push(`## ${answer.model}${laneMark(conversation, number)}\n\n${answer.text}`);
    });
  }
  return `${parts.join("\n\n")}\n`;
}

/** One line of JSON for each lane, in the form that `nemotron4 train` and `nemotron4 synth` read. */
export function asRows(conversation) {
  const last = conversation.turns.length - 1;
  const rows = conversation.lanes.map((_, lane) => (last < 0 ? [] : messagesFor(conversation, last, lane, { withAnswer: true })));
  return rows.filter((messages) => messages.some(({ role }) => role === "assistant")).map((messages) => `${JSON.stringify({ messages })}\n`).join("");
}

/**
 * The conversations of a file: this page's own JSON, or rows of messages (JSON lines, or one object).
 * @throws {Error} that says which line is none
 */
export function fromFile(text, lanes) {
  const rows = parsed(text);
  return rows.map((row, number) => {
    if (Array.isArray(row.turns) && Array.isArray(row.lanes)) return { ...opened(row), id: newId() };
    if (!Array.isArray(row.messages)) throw new Error(`Row ${number + 1} is neither a conversation of this page nor {"messages": [...]}.`);
    return fromMessages(row.messages, newConversation(lanes.slice(0, 1)));
  });
}

function parsed(text) {
  try {
    return [JSON.parse(text)].flat();
  } catch {
    return text.split("\n").filter((line) => line.trim()).map((line, number) => {
      try {
        return JSON.parse(line);
      } catch {
        throw new Error(`Line ${number + 1} is not JSON.`);
      }
    });
  }
}

function fromMessages(messages, conversation) {
  for (const { role, content } of messages) {
    if (role === "system") conversation.lanes[0].system = content;
    else if (role === "user") conversation.turns.push(newTurn(content, 1));
    else if (role === "assistant" && conversation.turns.length) {
      const lane = conversation.turns.at(-1).lanes[0];
      lane.answers.push({ ...newAnswer(conversation.lanes[0]), text: content, finish: "stop" });
      lane.shown = lane.answers.length - 1;
    } else throw new Error(`A message with the role ${JSON.stringify(role)} cannot stand there.`);
  }
  return conversation;
}

export const laneName = (number) => "AB"[number];
const laneMark = (conversation, number) => (conversation.lanes.length > 1 ? ` (${laneName(number)})` : "");
