// Nodes from names, attributes and text. Text is only ever a text node, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// facts: [term, description] pairs; those without a description are left out.
export function describe(list, facts) {
  const told = facts.filter(([, value]) => value !== null && value !== undefined);
  list.replaceChildren(
    ...told.map(([term, value]) =>
      element("div", {}, element("dt", {}, term), element("dd", {}, String(value))),
    ),
  );
}

// A table with a heading for each column; a cell is text or a node.
export function table(columns, rows) {
  const heads = columns.map((name) => element("th", { scope: "col" }, name));
  const lines = rows.map((cells) =>
    element("tr", {}, ...cells.map((cell) => element("td", {}, cell))),
  );
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...heads)),
    element("tbody", {}, ...lines),
  );
}
