// What the chosen exit says of a label task's labels: a bar of each one's probability.

import { element, svg, table } from "./dom.js";

const SHOWN = 10; // most probable first
const WIDTH = 120; // px, of a bar for certainty

// labels: {label: probability}; undefined where no probe answered.
export function showLabels(place, labels) {
  const all = Object.entries(labels ?? {}).sort(([, one], [, other]) => other - one);
  const rows = all.slice(0, SHOWN).map(([label, p]) => [label, bar(p)]);
  const rest = all.length - rows.length;
  place.replaceChildren(...(rows.length ? [table(["label", "probability"], rows)] : []));
  if (rest > 0) place.append(element("p", { class: "quiet" }, `and ${rest} others`));
}

function bar(p) {
  const picture = svg("svg", { width: WIDTH, height: 6, "aria-hidden": "true" });
  picture.append(svg("rect", { class: "distance", width: Math.max(1, WIDTH * p), height: 6, rx: 3 }));
  return element("span", { class: "measured" }, p.toFixed(3), picture);
}
