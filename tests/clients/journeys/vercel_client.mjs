// The AI SDK of Vercel with its provider for OpenAI's API: twelve journeys. test_clients.py gives the address and the model.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import assert from "node:assert";
import { z } from "zod";

const [baseURL, name] = process.argv.slice(2);
const where = { name: "nemotron4", baseURL, apiKey: "none" };
const provider = createOpenAICompatible({ ...where, includeUsage: true, supportsStructuredOutputs: true });
const settings = { model: provider(name), maxRetries: 0 };
const prompt = "What is the capital of France?";
const capital = "Paris is the capital of France.";

async function read(stream) {
  let text = "";
  for await (const part of stream.textStream) text += part;
  return text;
}

let answer = await generateText({ ...settings, prompt, temperature: 0 });
assert.equal(answer.text, capital);

let stream = streamText({ ...settings, prompt, system: "Be short.", temperature: 0 });
assert.equal(await read(stream), capital);
assert.ok((await stream.usage).outputTokens > 5);

const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async () => "20 degrees",
});
const agent = { ...settings, prompt: "Weather in Rome?", tools: { get_weather: weather }, stopWhen: stepCountIs(3) };
answer = await generateText({ ...agent, temperature: 0 });
assert.deepEqual([answer.text, answer.steps.length], ["It is 20 C in Rome.", 2]);
assert.equal(await read(streamText({ ...agent, temperature: 0 })), "It is 20 C in Rome.");

answer = await generateText({ ...settings, prompt, tools: { get_weather: weather }, toolChoice: "required" });
assert.equal(answer.toolCalls[0].toolName, "get_weather");

const schema = z.object({ name: z.string().max(20), size: z.number().int() });
const city = { ...settings, schema, prompt: "Name a city.", maxOutputTokens: 400 };
assert.ok(Number.isInteger((await generateObject(city)).object.size));
const objects = streamObject(city);
for await (const part of objects.partialObjectStream) assert.equal(typeof part, "object");
assert.ok(Number.isInteger((await objects.object).size));
answer = await generateText({ ...settings, prompt: "Name a city.", output: Output.object({ schema }), maxOutputTokens: 400 });
assert.equal(typeof answer.output.name, "string");

const parts = ["What is", " the capital of France?"].map((text) => ({ type: "text", text }));
const sampling = { topP: 0.9, presencePenalty: 0.1, frequencyPenalty: 0.1, stopSequences: ["###"], seed: 7 };
answer = await generateText({
  ...settings,
  ...sampling,
  messages: [{ role: "user", content: parts }],
  temperature: 0,
  maxOutputTokens: 50,
});
assert.equal(answer.finishReason, "stop");

const completion = { model: provider.completionModel(name), prompt: "Once", maxOutputTokens: 5, maxRetries: 0 };
assert.ok((await generateText(completion)).text);
assert.ok(await read(streamText(completion)));

const vectors = await embedMany({ model: provider.embeddingModel(name), values: ["one", "two"], maxRetries: 0 });
assert.equal(vectors.embeddings.length, 2);

await assert.rejects(generateText({ model: provider("other"), prompt, maxRetries: 0 }), {
  statusCode: 404,
  message: /is not served here/,
});
