// What is asked of the server about one text: which task it is, and its answer at a depth.

import { postJson } from "./api.js";

const SLOT = "{text}";
const PATHS = { completions: "v1/completions", chat: "v1/chat/completions" };

// The text in the task's template, unless it was typed with it.
export function rendered(template, text) {
  const [head, tail] = template.split(SLOT);
  return text.startsWith(head) && text.endsWith(tail) ? text : head + text + tail;
}

// question: {task: a task of the server's or null, endpoint, text, maxTokens}.
function requestBody(model, { task, endpoint, text, maxTokens }) {
  const prompt = task ? rendered(task.template, text) : text;
  const asked =
    endpoint === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  // A label task that is named is answered with one label, whatever the length.
  const limit = task?.labels.length ? {} : { max_tokens: maxTokens };
  return { model, ...asked, temperature: 0, ...limit };
}

// The question with the task that its prompt was recognised as, where naming that task is what
// lets it exit early. A prompt of a label task would otherwise run at full depth.
export async function recognised(server, question) {
  if (question.task || !server.preview) return question;
  const body = requestBody(server.model, question);
  const { json } = await postJson("v1/raee/preview", body);
  const { reason, task: name } = json.prompts[0];
  const task = reason === "unconstrained" && server.tasks.find((known) => known.name === name);
  return task ? { ...question, task } : question;
}

// {text, ms, decision}; raee: options beside the task.
export async function answer(server, question, raee) {
  const named = question.task ? { task: question.task.name } : {};
  const body = { ...requestBody(server.model, question), raee: { ...named, ...raee } };
  const { json, headers, ms } = await postJson(PATHS[question.endpoint], body);
  const [choice] = json.choices;
  const text = question.endpoint === "chat" ? choice.message.content : choice.text;
  return { text: text ?? "", ms, decision: decided(json, headers) };
}

// As the `raee` object tells it, or, on a server that does not explain, as the headers do.
function decided(json, headers) {
  if (json.raee) return json.raee.prompts[0];
  const told = (name) => {
    const value = headers.get(`x-raee-${name}`);
    return value === null || value === "-" ? null : value;
  };
  const number = (name) => (told(name) === null ? null : Number(told(name)));
  return {
    exit_layer: number("exit-layer"),
    num_layers: number("num-layers"),
    decided_layer: number("decided-layer"),
    reason: told("reason"),
    head: told("exit-head"),
    task: told("task"),
    distance: number("distance"),
    lookup_ms: number("lookup-ms"),
  };
}
