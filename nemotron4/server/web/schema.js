/** The fields and bounds of a request, read from the server's OpenAPI page. */

import { getJson } from "./api.js";

/** @typedef {{name: string, isInteger: boolean, min?: number, max?: number, fallback?: number, description?: string}} Field */

/**
 * The number fields of a request body by name.
 * @returns {Promise<{chat: Record<string, Field>, raw: Record<string, Field>, hasSchema: boolean}>} by route, and
 *   whether an answer can be held to a JSON schema
 */
export async function readFields() {
  const page = await getJson("openapi.json");
  const body = (path, method) => {
    const schema = page.paths[path][method].requestBody.content["application/json"].schema;
    return (schema.$ref ? page.components.schemas[schema.$ref.split("/").at(-1)] : schema).properties;
  };
  const chat = body("/v1/chat/completions", "post");
  const hasSchema = JSON.stringify([chat.response_format, page.components.schemas]).includes("json_schema");
  return { chat: numbers(chat), raw: numbers(body("/generate", "put")), hasSchema };
}

function numbers(properties) {
  const fields = {};
  for (const [name, property] of Object.entries(properties)) {
    const kinds = property.anyOf ?? [property];
    const kind = kinds.find((each) => [each.type].flat().some((type) => type === "number" || type === "integer"));
    if (!kind) continue;
    const isInteger = [kind.type].flat().includes("integer");
    const above = kind.exclusiveMinimum;
    const below = kind.exclusiveMaximum;
    fields[name] = {
      name,
      isInteger,
      min: kind.minimum ?? (above === undefined ? undefined : isInteger ? above + 1 : above),
      isMinOpen: above !== undefined && !isInteger,
      max: kind.maximum ?? (below === undefined ? undefined : below - 1),
      fallback: property.default ?? property["x-default"],
    };
  }
  return fields;
}

/** Why a text is no value of the field, or null. An empty text leaves the field out. */
export function problem(field, text) {
  if (text === "") return null;
  const value = Number(text);
  if (!Number.isFinite(value)) return "not a number";
  if (field.isInteger && !Number.isInteger(value)) return "must be a whole number";
  if (field.isMinOpen && value <= field.min) return `must be more than ${field.min}`;
  if (field.min !== undefined && value < field.min) return `must be at least ${field.min}`;
  if (field.max !== undefined && value > field.max) return `must be at most ${field.max}`;
  return null;
}
