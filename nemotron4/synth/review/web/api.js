/** The interface of the run's folder: see `synth/review/app.py`. */

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The review server does not answer. Is `nemotron4 synth review` still running?");
  }
  const body = await response.json();
  if (!response.ok) throw new Error([body.error.message, body.error.hint].filter(Boolean).join(": "));
  return body;
}

export const getRun = () => ask("api/run");
export const getRows = (query) => ask(`api/rows?${new URLSearchParams(query)}`);
export const getRow = (id) => ask(`api/rows/${id}`);
export const putReview = (id, review) =>
  ask(`api/rows/${id}/review`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(review),
  });
