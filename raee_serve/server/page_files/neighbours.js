// The rows that a prompt was found to be near to, nearest first.

import { byId, element, svg, table } from "./dom.js";

const SHOWN = 8; // at first; a button shows the others

export function showNeighbours(decision, server) {
  const place = byId("neighbours");
  const rows = decision.neighbours ?? [];
  if (!rows.length) {
    const why = server.explain
      ? "No look-up was made."
      : "This server does not explain its decisions.";
    place.replaceChildren(element("p", { class: "quiet" }, why));
    return;
  }
  const labelled = rows.some((row) => row.label !== null);
  const farthest = rows.at(-1).distance;
  const listed = (some) => neighbourTable(some, labelled, farthest);
  place.replaceChildren(...(labelled ? [votes(rows)] : []), listed(rows.slice(0, SHOWN)));
  if (rows.length > SHOWN) place.append(showAll(rows, listed));
}

function neighbourTable(rows, labelled, farthest) {
  const columns = ["distance", ...(labelled ? ["label"] : []), "row"];
  const lines = rows.map((row) => [
    distance(row.distance, farthest),
    ...(labelled ? [row.label ?? ""] : []),
    element("code", {}, row.id),
  ]);
  const scrolled = { class: "scrolled", tabindex: "0", role: "region", "aria-label": "Neighbours" };
  return element("div", scrolled, table(columns, lines));
}

// A number, and a bar of that share of the farthest neighbour's.
function distance(value, farthest) {
  const width = farthest ? Math.max(1, (48 * value) / farthest) : 1;
  const bar = svg("svg", { width: 48, height: 6, "aria-hidden": "true" });
  bar.append(svg("rect", { class: "distance", width, height: 6, rx: 3 }));
  return element("span", { class: "measured" }, value.toFixed(4), bar);
}

function votes(rows) {
  const counts = new Map();
  for (const { label } of rows) counts.set(label, (counts.get(label) ?? 0) + 1);
  const most = [...counts].sort((one, other) => other[1] - one[1]);
  const pills = most.map(([label, count]) =>
    element("li", { class: "pill" }, `${label} `, element("strong", {}, String(count))),
  );
  return element("ul", { class: "votes", "aria-label": "Labels of all neighbours" }, ...pills);
}

function showAll(rows, listed) {
  const button = element("button", { type: "button", class: "plain" }, `Show all ${rows.length}`);
  button.addEventListener("click", () => {
    const all = listed(rows);
    button.previousSibling.replaceWith(all);
    button.remove();
    all.focus();
  });
  return button;
}
