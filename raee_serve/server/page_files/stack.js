// The hero: the model's layers as a stack of slabs, those that run filled, and beside each layer
// how well the neighbours let expect an exit there to do.

import { element, svg, table } from "./dom.js";

const TALLEST = 440; // px, of the slabs together
const PITCH = { least: 4, most: 20 }; // px, from one slab to the next
const TOP = 44; // px above the slabs: the uppermost one's face, and what the dashed line is
const BOTTOM = 6;

// {width: px, num_layers} -> where things are. x: left edges; y(layer): upper edge of its front.
function placed(width, layers) {
  const pitch = Math.min(PITCH.most, Math.max(PITCH.least, TALLEST / layers));
  const narrow = width < 520;
  const side = narrow ? 14 : 30;
  const front = narrow ? 58 : 150;
  const left = narrow ? 72 : 96; // of the side's lower corner
  const bars = left + side + front + 36;
  return {
    width,
    height: TOP + layers * pitch + BOTTOM,
    pitch,
    thick: pitch * 0.66,
    x: { side: left, front: left + side, end: left + side + front, bars },
    longest: Math.max(40, width - bars - 8),
    lean: narrow ? 9 : 18, // how far a slab's back edge lies above its front edge
    y: (layer) => TOP + (layers - layer) * pitch,
  };
}

// decision: null before the first one. Returns the picture for this width.
export function stackPicture(width, layers, decision) {
  const at = placed(width, layers);
  const run = decision?.exit_layer ?? 0;
  const scores = decision ? bestScores(decision) : null;
  const title = decision ? said(decision, scores) : `${layers} layers, none run yet`;
  const picture = svg("svg", {
    class: "stack",
    role: "img",
    "aria-label": title,
    width,
    height: at.height,
    viewBox: `0 0 ${width} ${at.height}`,
  });
  for (let layer = 1; layer <= layers; layer++) picture.append(slab(at, layer, layer <= run));
  if (decision) picture.append(...brackets(at, run, layers));
  picture.append(...layerNumbers(at, layers, run));
  if (scores) picture.append(...bars(at, scores, decision));
  return picture;
}

// [num_layers]: of each layer's best head, by which exits are chosen. null without a look-up.
function bestScores({ expected }) {
  const heads = Object.values(expected ?? {});
  if (!heads.length) return null;
  return heads[0].map((_, i) => Math.max(...heads.map((scores) => scores[i])));
}

function said({ exit_layer: run, num_layers: all }, scores) {
  const depth = `${run} of ${all} layers run.`;
  if (!scores) return depth;
  const best = Math.max(...scores);
  const where = scores.indexOf(best) + 1;
  return `${depth} Expected quality by layer: best at layer ${where}, ${best.toFixed(2)}; ` +
    `at layer ${run} ${scores[run - 1].toFixed(2)}.`;
}

function slab({ x, y, thick, lean }, layer, runs) {
  const top = y(layer);
  const depth = x.front - x.side;
  const group = svg("g", { class: runs ? "slab run" : "slab" });
  const points = (...pairs) => ({ points: pairs.map((pair) => pair.join(",")).join(" ") });
  group.append(
    svg("polygon", {
      class: "face",
      ...points([x.front, top], [x.end, top], [x.end - depth, top - lean], [x.side, top - lean]),
    }),
    svg("polygon", {
      class: "side",
      ...points(
        [x.front, top], [x.side, top - lean], [x.side, top - lean + thick], [x.front, top + thick],
      ),
    }),
    svg("rect", { class: "front", x: x.front, y: top, width: x.end - x.front, height: thick }),
  );
  return group;
}

// How many run and how many do not, beside the two parts of the stack.
function brackets({ x, y, pitch, lean }, run, layers) {
  const parts = [[1, run, "run"], [run + 1, layers, "skipped"]];
  return parts.filter(([first, last]) => last >= first).flatMap(([first, last, word]) => {
    const [upper, lower] = [y(last) - lean + 2, y(first) - lean + pitch - 2];
    const right = x.side - 8;
    const middle = (upper + lower) / 2;
    const text = { x: right - 10, "text-anchor": "end", class: `bracket-text ${word}` };
    return [
      svg("path", { class: `bracket ${word}`, d: `M${right} ${upper}h-5V${lower}h5` }),
      svg("text", { ...text, y: middle }, String(last - first + 1)),
      svg("text", { ...text, y: middle + 13 }, word),
    ];
  });
}

// The exit's, the ends', and round ones between, as far as there is room.
function layerNumbers({ x, y, thick, pitch }, layers, run) {
  const step = [1, 2, 5, 10, 20].find((step) => step * pitch >= 44) ?? 40;
  const round = Array.from({ length: Math.floor(layers / step) }, (_, i) => (i + 1) * step);
  const shown = [];
  for (const layer of [run || layers, layers, 1, ...round]) {
    if (shown.every((other) => Math.abs(other - layer) * pitch >= 12)) shown.push(layer);
  }
  return shown.map((layer) =>
    svg(
      "text",
      {
        class: layer === run ? "number chosen" : "number",
        x: x.bars - 8,
        y: y(layer) + thick / 2 + 4,
        "text-anchor": "end",
      },
      String(layer),
    ),
  );
}

function bars({ x, y, thick, longest, height }, scores, decision) {
  const { exit_layer: run, reason, choice, expected, head } = decision;
  const best = Math.max(...scores) || 1;
  const length = (score) => Math.max(1, (longest * Math.max(score, 0)) / best);
  const drawn = scores.map((score, i) => {
    const chosen = i + 1 === run && reason === "retrieved" ? " chosen" : "";
    return svg(
      "rect",
      {
        class: `bar${i < run ? " run" : ""}${chosen}`,
        x: x.bars,
        y: y(i + 1),
        width: length(score),
        height: thick,
        rx: Math.min(2, thick / 3),
      },
      svg("title", {}, `layer ${i + 1}: ${score.toFixed(3)}`),
    );
  });
  if (!(head in expected)) return drawn; // the paper's rule, which has no budget
  const asked = x.bars + longest * choice.budget;
  const label = `budget: ${Math.round(100 * choice.budget)}% of the best`;
  return [
    ...drawn,
    svg("line", { class: "needed", x1: asked, x2: asked, y1: TOP - 14, y2: height }),
    svg("text", { class: "needed-text", x: asked, y: TOP - 22, "text-anchor": "end" }, label),
  ];
}

// The same as a table, by layer; null without a look-up.
export function scoreTable({ expected }) {
  const heads = Object.keys(expected ?? {});
  if (!heads.length) return null;
  const rows = expected[heads[0]].map((_, i) => [
    String(i + 1),
    ...heads.map((head) => expected[head][i].toFixed(4)),
  ]);
  return table(["layer", ...heads.map((head) => `${head} head`)], rows);
}
