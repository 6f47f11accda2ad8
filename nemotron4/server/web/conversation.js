/**
 * What a conversation is. A lane is one model with one group of settings; side by side there are two, and each
 * goes on from its own answers. A turn is what the user said and, in each lane, every answer to it.
 *
 * @typedef {{text: string, tokens: Token[], finish: string | null, error: string | null, model: string,
 *   settings: string, numTokens: number | null, seconds: number, score: Score | null,
 *   scoreError?: string}} Answer
 * @typedef {{answers: Answer[], shown: number}} LaneAnswers
 * @typedef {{user: string, lanes: LaneAnswers[]}} Turn
 * @typedef {{model: string, isOther: boolean, system: string, values: Record<string, string>, stop: string}} Lane
 * @typedef {{id: string, title: string, updated: number, lanes: Lane[], turns: Turn[]}} Conversation
 * @typedef {{text: string, logprob: number, top: {text: string, logprob: number}[]}} Token
 * @typedef {{attributes: Record<string, number>, reward: number | null}} Score
 */

export function newLane(model, isOther = false) {
  return { model, isOther, system: "", values: {}, stop: "" };
}

export function newConversation(lanes) {
  const id = `${Date.now()}-${Math.random().toString(36).slice(2)}`;
  return { id, title: "", updated: Date.now(), lanes: structuredClone(lanes), turns: [] };
}

/** A copy with the first lane alone. */
export function firstSide(conversation) {
  const copy = newConversation(conversation.lanes.slice(0, 1));
  copy.turns = conversation.turns.map(({ user, lanes }) => ({ user, lanes: structuredClone(lanes.slice(0, 1)) }));
  return copy;
}

export function newTurn(user, numLanes) {
  return { user, lanes: Array.from({ length: numLanes }, () => ({ answers: [], shown: -1 })) };
}

export function newAnswer(lane) {
  const settings = Object.entries(lane.values).filter(([, text]) => text !== "").map(([name, text]) => `${name.replaceAll("_", " ")} ${text}`).join(", ");
  return { text: "", tokens: [], finish: null, error: null, model: lane.model, settings, numTokens: null, seconds: 0, score: null };
}

/** The answer that is shown, or null. */
export function shownAnswer(turn, lane) {
  return turn.lanes[lane]?.answers[turn.lanes[lane].shown] ?? null;
}

/** The messages that ask for the answer of a turn in a lane; with its answer when it shall be judged. */
export function messagesFor(conversation, turnNumber, lane, { withAnswer = false } = {}) {
  const messages = [];
  const system = conversation.lanes[lane].system.trim();
  if (system) messages.push({ role: "system", content: system });
  for (let number = 0; number <= turnNumber; number++) {
    const turn = conversation.turns[number];
    messages.push({ role: "user", content: turn.user });
    const answer = shownAnswer(turn, lane);
    if (answer && (number < turnNumber || withAnswer)) messages.push({ role: "assistant", content: answer.text });
  }
  return messages;
}

/** The body of the chat request that asks for it. */
export function chatBody(conversation, turnNumber, lane, fields) {
  const { model, values, stop } = conversation.lanes[lane];
  const body = { model, messages: messagesFor(conversation, turnNumber, lane) };
  for (const [name, text] of Object.entries(values)) {
    if (text !== "" && fields[name]) body[name] = Number(text);
  }
  const stops = stop.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  return body;
}

export function titleOf(conversation) {
  const first = conversation.title || conversation.turns[0]?.user || "New conversation";
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
      if (answer) parts.push(`## ${answer.model}${laneMark(conversation, number)}\n\n${answer.text}`);
    });
  }
  return `${parts.join("\n\n")}\n`;
}

/** One line of JSON for each lane, in the form that `nemotron4 train` and `nemotron4 synth` read. */
export function asRows(conversation) {
  const last = conversation.turns.length - 1;
  if (last < 0) return "";
  return conversation.lanes
    .map((_, lane) => JSON.stringify({ messages: messagesFor(conversation, last, lane, { withAnswer: true }) }))
    .join("\n") + "\n";
}

export const laneName = (number) => "AB"[number];
const laneMark = (conversation, number) => (conversation.lanes.length > 1 ? ` (${laneName(number)})` : "");
