// A decision in words: the headline, why, and the facts behind it.

import { byId, describe, element } from "./dom.js";

const REASONS = {
  override: "The request or the server's --exit-layer fixed this depth.",
  off: "Early exit is off: this is vanilla vLLM.",
  unmatched:
    "The prompt belongs to no task of the table. Choose one, or type it in a task's template.",
  unconstrained:
    "This is a label task whose output is not limited to its labels. Choose the task.",
  adapter: "The request is for an adapter, of which the table knows nothing.",
  far: "Even the nearest rows are farther away than the task's own rows are from each other.",
  "no-exit": "No exit of this task reaches the budget, whatever the neighbours.",
  "no-evidence": "No exit does well on any of the neighbours.",
  timeout: "The look-up took longer than the server waits for it.",
  error: "The look-up failed; the server's log says why.",
};

export function showDecision(decision) {
  const { exit_layer: run, num_layers: all } = decision;
  const saved = all - run;
  byId("headline").replaceChildren(
    element("strong", {}, String(run)),
    ` of ${all} layers`,
    element("span", { class: "pill" }, saved ? `${percent(saved / all)} saved` : "full depth"),
  );
  byId("why").textContent = because(decision);
  describe(byId("facts"), facts(decision));
}

function because(decision) {
  const { reason, choice, expected, head, exit_layer: layer, decided_layer: decided } = decision;
  if (reason === "shadow") return `Layer ${decided} was chosen; --shadow runs all layers anyway.`;
  if (reason !== "retrieved") return REASONS[reason] ?? `Reason: ${reason}.`;
  if (decided) return `Layer ${decided} was chosen; the next exit point that serves is ${layer}.`;
  if (!choice) return "The neighbours' exit information chose this depth.";
  if (!(head in expected)) return `The paper's rule chose layer ${layer}.`;
  const kept = `${percent(choice.budget)} of the best exit's quality`;
  return `Layer ${layer} is the first that is expected to keep ${kept}.`;
}

function facts({ reason, task, choice, head, certainty, distance, lookup_ms: ms }) {
  const far = choice ? ` (far beyond ${choice.max_distance.toFixed(3)})` : "";
  return [
    ["reason", reason],
    ["task", task],
    ["head", head],
    ["budget", choice ? `${percent(choice.budget)}, k ${choice.k}` : null],
    ["certainty without the model", typeof certainty === "number" ? percent(certainty) : null],
    ["nearest row", distance === null ? null : `${distance.toFixed(3)}${far}`],
    ["look-up", ms ? `${ms.toFixed(1)} ms` : null],
  ];
}

export function percent(share) {
  return `${Math.round(100 * share)}%`;
}
