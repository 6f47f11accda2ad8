/** One row: the conversation, its answers side by side, the reviewer's marks, and where the row comes from. */

import { h } from "./dom.js";

const NO_REVIEW = { verdict: null, preferred: null, ratings: {}, edits: {}, comment: "" };

/** The annotator's own review of a row, or an empty one to start from. */
export function ownReview(row, annotator) {
  const { at: _, ...own } = row.reviews.find((review) => review.annotator === annotator) ?? NO_REVIEW;
  return structuredClone({ ...own, annotator });
}

/** Which answer stands left: drawn from the id, so that the judge's choice is not always on one side. */
export function sides(row) {
  const names = Object.keys(row.answers);
  return parseInt(row.id.slice(-1), 16) % 2 ? names.reverse() : names;
}

/**
 * @param {object} row what the server tells of it
 * @param {object} review the annotator's review, as it stands
 * @param {{attributes: string[], blind: boolean, editing: boolean, change: (part: object) => void}} view
 */
export function detail(row, review, view) {
  const isRevealed = !view.blind || review.preferred !== null;
  return [
    ...messages(row.row),
    h("div", { class: "answers" }, ...sides(row).map((side, i) => answer(row, review, view, side, i, isRevealed))),
    Object.keys(row.answers).length ? marks(row, review, view) : null,
    others(row, review.annotator),
    h("h2", {}, "Where it comes from"),
    ancestry(row.ancestry),
  ].filter(Boolean);
}

function messages(row) {
  const source = row.prompt ?? row;
  const turns = source.messages ?? [];
  const shown = row.kind === "dialogue" ? turns.slice(0, -1) : turns;
  if (!turns.length) return [h("pre", { class: "turn" }, JSON.stringify(row, null, 1))];
  return shown.map(([role, content]) => h("div", { class: "turn" }, h("strong", {}, role), content));
}

function answer(row, review, view, side, place, isRevealed) {
  const given = row.answers[side];
  const isPair = Object.keys(row.answers).length === 2;
  const name = isPair ? ["Left", "Right"][place] : "Answer";
  const text = review.edits[side] ?? given.text;
  const judged = isPair && isRevealed ? (side === "chosen" ? "the judge's choice" : "rejected by the judge") : "";
  const edited = side in review.edits ? " (edited)" : "";
  return h(
    "section",
    { class: review.preferred === side ? "answer preferred" : "answer", "data-side": side },
    h("h3", {}, name + edited, h("span", {}, [judged, isRevealed && given.model].filter(Boolean).join(" · "))),
    view.editing
      ? h("textarea", {
          "aria-label": `${name}: the text`,
          onchange: (event) => view.change({ edits: withEdit(review.edits, side, event.target.value, given.text) }),
        }, text)
      : h("div", { class: "text" }, text),
    isRevealed ? bars(given) : null,
    ratings(review, view, side, name),
  );
}

/** The edits with one text in place; a text that is the model's own again is no edit. */
function withEdit(edits, side, text, original) {
  const { [side]: _, ...rest } = edits;
  return text === original ? rest : { ...rest, [side]: text };
}

function bars(given) {
  const rows = Object.entries(given.attributes).flatMap(([name, value]) => [
    h("span", {}, name),
    h("meter", { min: 0, max: 4, value, "aria-label": `${name} ${value.toFixed(2)}` }),
    h("span", { class: "number" }, value.toFixed(2)),
  ]);
  // A reward has no scale of its own: an LLM judge gives 0 and 1, a reward model any number.
  if (given.reward != null) rows.push(h("span", {}, "reward"), h("span"), h("span", { class: "number" }, given.reward.toFixed(2)));
  return rows.length ? h("div", { class: "bars" }, ...rows) : null;
}

function ratings(review, view, side, name) {
  const rows = view.attributes.flatMap((attribute) => {
    const rated = review.ratings[side]?.[attribute];
    const buttons = [0, 1, 2, 3, 4].map((value) =>
      h("button", {
        type: "button",
        "aria-pressed": rated === value,
        "aria-label": `${name}: ${attribute} ${value}`,
        onclick: () => view.change({ ratings: withRating(review.ratings, side, attribute, rated === value ? null : value) }),
      }, String(value)));
    return [h("span", {}, attribute), h("div", { class: "scale", role: "group", "aria-label": `${name}: ${attribute}` }, ...buttons)];
  });
  return h("div", { class: "ratings" }, ...rows);
}

function withRating(all, side, attribute, value) {
  const { [attribute]: _, ...rest } = all[side] ?? {};
  return { ...all, [side]: value === null ? rest : { ...rest, [attribute]: value } };
}

function marks(row, review, view) {
  const toggle = (field, value, label, id, kind = "") =>
    h("button", {
      type: "button", id, class: kind, "aria-pressed": review[field] === value,
      onclick: () => view.change({ [field]: review[field] === value ? null : value }),
    }, label);
  const [left, right] = sides(row);
  const preference = right
    ? [toggle("preferred", left, "Left is better", "prefer-left"), toggle("preferred", "tie", "Tie", "prefer-tie"),
       toggle("preferred", right, "Right is better", "prefer-right")]
    : [];
  return h("div", {},
    h("div", { class: "row" },
      toggle("verdict", "accept", "Accept", "accept"), toggle("verdict", "reject", "Reject", "reject", "reject"),
      h("button", { type: "button", id: "edit", "aria-pressed": view.editing, onclick: view.toggleEditing }, "Edit"),
      ...preference),
    h("textarea", { id: "comment", "aria-label": "Comment", placeholder: "Comment",
      onchange: (event) => view.change({ comment: event.target.value }) }, review.comment));
}

function others(row, annotator) {
  const found = row.reviews.filter((review) => review.annotator !== annotator);
  if (!found.length) return null;
  const said = (review) => [review.verdict, review.preferred && `prefers ${review.preferred}`, review.comment].filter(Boolean).join(", ");
  return h("div", {}, h("h2", {}, "Other reviewers"), ...found.map((review) => h("p", { class: "muted" }, `${review.annotator}: ${said(review)}`)));
}

/** The row's ancestors, the first one first; each opens to its content, raw replies and what was done to it. */
function ancestry(steps) {
  return h("ol", { class: "steps" }, ...steps.map((step) => {
    const work = step.work.map((each) => `${each.stage}: ${each.state}${each.reason ? ` (${each.class}: ${each.reason})` : ""}`);
    return h("li", {},
      h("details", {},
        h("summary", {}, h("strong", {}, step.stage), " ", h("code", {}, step.id.slice(0, 12)), ` ${step.calls.length} replies`),
        h("pre", {}, JSON.stringify(step.row, null, 1)),
        ...step.calls.map((call) => h("pre", {}, `reply ${call.sample} to ${call.stage}, ${call.tokens[1] ?? "?"} tokens:\n${replyText(call.reply)}`)),
        work.length ? h("p", { class: "muted" }, work.join(" · ")) : null));
  }));
}

const replyText = (reply) => (typeof reply.text === "string" ? reply.text : JSON.stringify(reply, null, 1));
