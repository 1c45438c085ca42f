// A decision in words: the headline, why, and the facts behind it.

import { byId, describe, element } from "./dom.js";

const REASONS = {
  override: "The request or the server's --exit-layer fixed this depth.",
  off: "Early exit is off: this is vanilla vLLM.",
  unmatched:
    "The prompt belongs to no task of the table. Choose one, or type it in a task's template.",
  unconstrained:
    "This is a label-word task whose output is not limited to its label words. Choose the task.",
  adapter: "The request is for an adapter, of which the table knows nothing.",
  far: "Even the nearest rows are farther away than the task's own rows are from each other.",
  "no-exit": "No exit of this task keeps the quality asked for, whatever the neighbours.",
  "no-evidence": "No layer answers any of the neighbours correctly.",
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
  const { reason, rule, exit_layer: layer, decided_layer: decided } = decision;
  if (reason === "shadow") return `Layer ${decided} was chosen; --shadow runs all layers anyway.`;
  if (reason !== "retrieved") return REASONS[reason] ?? `Reason: ${reason}.`;
  if (decided) return `Layer ${decided} was chosen; the next exit point that serves is ${layer}.`;
  if (!rule) return "The neighbours' exit information chose this depth.";
  if (rule.name === "published") return `Layer ${layer} has the most evidence of the neighbours.`;
  return `Layer ${layer} is the first with ${percent(rule.fraction)} of the best layer's evidence.`;
}

function facts({ reason, task, rule, head, distance, lookup_ms: ms }) {
  const far = rule ? ` (far beyond ${rule.max_distance.toFixed(3)})` : "";
  return [
    ["reason", reason],
    ["task", task],
    ["rule", rule ? `${rule.name}, k ${rule.k}` : null],
    ["head", rule ? head : null],
    ["nearest row", distance === null ? null : `${distance.toFixed(3)}${far}`],
    ["look-up", ms ? `${ms.toFixed(1)} ms` : null],
  ];
}

export function percent(share) {
  return `${Math.round(100 * share)}%`;
}
