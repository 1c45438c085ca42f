// The page: a prompt goes in; what was decided, why, and the answers at both depths come out.

import { ApiError, apiKey, getJson, setApiKey } from "./api.js";
import { answer, recognised } from "./asking.js";
import { showDecision } from "./decision.js";
import { byId, describe, element } from "./dom.js";
import { showLabels } from "./labels.js";
import { refreshLive, startLive } from "./live.js";
import { showNeighbours } from "./neighbours.js";
import { scoreTable, stackPicture } from "./stack.js";

let server = null; // what GET /v1/raee/page tells, and the name of its model
let decision = null; // the one that is shown
let turn = Promise.resolve(); // settles when what was begun is done
let running = false;

byId("key").value = apiKey();
byId("key-form").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", () => {
  setApiKey(byId("key").value.trim());
  inTurn(connect);
});
byId("task").addEventListener("change", showForm);
byId("endpoints").addEventListener("change", showForm);
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) inTurn(run);
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
new ResizeObserver(drawStack).observe(byId("stack"));
startLive();
inTurn(connect);

// One thing after another; what goes wrong is told beside the form.
function inTurn(act) {
  turn = turn.then(async () => {
    byId("error").hidden = true;
    try {
      await act();
    } catch (error) {
      fail(error);
    }
  });
}

function fail(error) {
  const told = error instanceof ApiError;
  if (!told) console.error(error);
  byId("status").textContent = "";
  byId("error").textContent = told ? error.message : `The page failed: ${error}`;
  byId("error").hidden = false;
  byId("key").setAttribute("aria-invalid", String(error.status === 401));
  if (error.status === 401) byId("key").focus();
}

async function connect() {
  const [told, models] = await Promise.all([getJson("v1/raee/page"), getJson("v1/models")]);
  server = { ...told, model: models.data[0].id };
  byId("key").setAttribute("aria-invalid", "false");
  byId("server").textContent = `${server.model}, ${server.num_layers} layers`;
  const [automatic] = byId("task").options;
  const options = server.tasks.map(({ name }) => element("option", { value: name }, name));
  byId("task").replaceChildren(automatic, ...options);
  showForm();
  drawStack();
}

async function run() {
  running = true;
  byId("run").setAttribute("aria-disabled", "true");
  try {
    await askBoth();
  } finally {
    running = false;
    byId("run").removeAttribute("aria-disabled");
  }
}

async function askBoth() {
  if (!server) await connect();
  const status = byId("status");
  status.textContent = "Deciding, and running to the chosen depth.";
  clear("chosen");
  clear("full");
  byId("labels").replaceChildren();
  const question = await recognised(server, asked());
  const chosen = await answer(server, question, server.explain ? { explain: true } : {});
  decision = chosen.decision;
  showDecision(decision);
  showNeighbours(decision, server);
  drawStack();
  showAnswer("chosen", chosen, chosen.ms);
  showLabels(byId("labels"), decision.labels);
  status.textContent = "Running to full depth.";
  const full = await answer(server, question, { exit_layer: "full" });
  const longest = Math.max(chosen.ms, full.ms);
  showAnswer("chosen", chosen, longest);
  showAnswer("full", full, longest);
  status.textContent = summary(question, chosen, full);
  await refreshLive();
}

// The form as a question, see asking.js.
function asked() {
  const task = server.tasks.find(({ name }) => name === byId("task").value) ?? null;
  const picked = document.querySelector("input[name=endpoint]:checked").value;
  return {
    task,
    endpoint: task ? task.endpoint : picked,
    text: byId("text").value,
    maxTokens: Number(byId("max-tokens").value),
  };
}

function summary(question, chosen, full) {
  const { exit_layer: run, num_layers: all } = chosen.decision;
  const same = chosen.text === full.text ? "the same answer" : "another answer";
  const recognised = question.task && !byId("task").value;
  const task = recognised ? `Recognised as ${question.task.name}. ` : "";
  return `${task}Done: ${run} of ${all} layers; full depth gives ${same}.`;
}

// What the chosen task leaves open.
function showForm() {
  const { task } = asked();
  byId("text-label").textContent = task ? "Text" : "Prompt";
  byId("template").textContent = task
    ? `Sent as “${task.template}”, answered with ${words(task)}.`
    : "A prompt in a task's template is recognised.";
  byId("endpoints").hidden = Boolean(task) || !server.has_chat_template;
  const limited = Boolean(task?.labels.length);
  byId("length").hidden = limited;
  byId("max-tokens").disabled = limited;
}

function words({ labels }) {
  if (labels.length > 8) return `one of ${labels.length} labels`;
  return labels.length ? labels.join(", ").replace(/, ([^,]*)$/, " or $1") : "free text";
}

function drawStack() {
  const place = byId("stack");
  if (!server || !place.clientWidth) return;
  place.replaceChildren(stackPicture(place.clientWidth, server.num_layers, decision));
  const numbers = decision && scoreTable(decision);
  byId("numbers").hidden = !numbers;
  if (numbers) byId("numbers").lastElementChild.replaceChildren(numbers);
}

function clear(id) {
  byId(id).replaceChildren(element("p", { class: "quiet" }, "…"));
}

// longest: ms that fill the bar.
function showAnswer(id, { text, ms, decision: { exit_layer: run, num_layers: all } }, longest) {
  const facts = element("dl");
  describe(facts, [
    ["layers", `${run} of ${all}`],
    ["time", `${ms.toFixed(0)} ms`],
  ]);
  byId(id).replaceChildren(
    element("p", { class: text.length > 40 ? "said long" : "said" }, text.trim() || "(nothing)"),
    element("progress", { max: longest, value: ms, "aria-hidden": "true" }),
    facts,
  );
}
