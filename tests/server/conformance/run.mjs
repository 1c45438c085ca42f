// Runs cases with the official SDK for Node, as client.py does with the one for Python: the plan
// comes on standard input, the answers go to standard output.

import { readFileSync } from "node:fs";
import OpenAI from "openai";

const plan = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: plan.base_url, apiKey: "none", maxRetries: 0 });

function send({ call, body, extra }) {
  if (call === "get") return client.get(body.path);
  if (call === "models.retrieve") return client.models.retrieve(body.model);
  if (call === "models.list") return client.models.list();
  const resource = call.split(".").reduce((found, name) => found[name], client);
  return resource.create({ ...body, ...extra });
}

function ours(headers) {
  return Object.fromEntries([...headers].filter(([name]) => name.startsWith("x-raee-")));
}

async function answer(one) {
  try {
    const { data, response } = await send(one).withResponse();
    const found = { status: response.status, headers: ours(response.headers) };
    if (one.call === "models.list") return { ...found, body: data.data };
    if (!one.body.stream) return { ...found, body: data };
    const chunks = [];
    for await (const chunk of data) chunks.push(chunk);
    return { ...found, chunks };
  } catch (error) {
    if (!(error instanceof OpenAI.APIError) || error instanceof OpenAI.APIConnectionError) throw error;
    // Without a status it came in the middle of a stream.
    return { status: error.status ?? 200, headers: ours(error.headers ?? []), error: error.error };
  }
}

const answers = [];
for (const one of plan.cases) answers.push(await answer(one));
console.log(JSON.stringify(answers));
