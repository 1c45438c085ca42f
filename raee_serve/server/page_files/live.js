// What the server has done for everybody so far, read anew every few seconds while the page is
// seen.

import { getText } from "./api.js";
import { byId, describe, svg } from "./dom.js";
import { percent } from "./decision.js";
import { buckets, parsed, total } from "./metrics.js";

const EVERY_MS = 3000;
const HEIGHT = 190; // px, of a chart

let timer = 0;
let latest = null;

export function startLive() {
  document.addEventListener("visibilitychange", refreshLive);
  new ResizeObserver(() => latest && draw(latest)).observe(byId("depths"));
  return refreshLive();
}

// Read now, and again in a while unless the page is hidden.
export async function refreshLive() {
  clearTimeout(timer);
  if (document.hidden) return;
  const state = byId("live-state");
  try {
    latest = parsed(await getText("metrics"));
    draw(latest);
    state.textContent = `As of ${new Date().toLocaleTimeString()}, every ${EVERY_MS / 1000} s.`;
  } catch (error) {
    state.textContent = `Not up to date: ${error.message}`;
  }
  clearTimeout(timer); // of a reading that was under way at the same time
  timer = setTimeout(refreshLive, EVERY_MS);
}

function draw(samples) {
  describe(byId("totals"), totals(samples));
  show("depths", depths(samples), (layer) => String(layer), "layer");
  show("lookups", buckets(samples, "raee_lookup_seconds"), milliseconds, "");
}

// One column a layer, also before the first prompt, when there is no histogram yet.
function depths(samples) {
  const told = buckets(samples, "raee_exit_layer");
  const counts = new Map(told.map(({ upTo, count }) => [upTo, count]));
  const layers = Array.from({ length: total(samples, "raee_num_layers") }, (_, i) => i + 1);
  return layers.map((layer) => ({ upTo: layer, count: counts.get(layer) ?? 0 }));
}

function totals(samples) {
  const prompts = total(samples, "raee_exit_layer_count");
  const layers = prompts * total(samples, "raee_num_layers");
  const lookups = total(samples, "raee_lookup_seconds_count");
  const embedded = total(samples, "raee_cache_total");
  const saved = total(samples, "raee_layers_saved_total") / layers;
  const mean = (1000 * total(samples, "raee_lookup_seconds_sum")) / lookups;
  const remembered = total(samples, "raee_cache_total", "result", "hit") / embedded;
  const version = samples.get("raee_table_info")?.[0]?.labels.version;
  return [
    ["prompts", prompts.toLocaleString()],
    ["layers saved", layers ? percent(saved) : "none yet"],
    ["mean look-up", lookups ? `${mean.toFixed(1)} ms` : "none yet"],
    ["embeddings remembered", embedded ? percent(remembered) : null],
    ["table", version ? `version ${version}` : null],
  ];
}

function milliseconds(seconds) {
  if (seconds === Infinity) return "more";
  return seconds >= 1 ? `${seconds} s` : `${Math.round(1000 * seconds)} ms`;
}

// Columns of counts; `unit` goes before a column's name where it is told in full.
function show(id, columns, named, unit) {
  const place = byId(id);
  const width = place.clientWidth;
  if (!columns.length || !width) return;
  const step = width / columns.length;
  const most = Math.max(1, ...columns.map(({ count }) => count));
  const floor = HEIGHT - 20;
  const full = ({ upTo, count }) => `${unit} ${named(upTo)}: ${count}`.trim();
  const told = columns.filter(({ count }) => count).map(full).join(", ");
  const chart = svg("svg", {
    class: "columns",
    role: "img",
    "aria-label": told || "nothing yet",
    width,
    height: HEIGHT,
    viewBox: `0 0 ${width} ${HEIGHT}`,
  });
  chart.append(svg("line", { class: "floor", x1: 0, x2: width, y1: floor, y2: floor }));
  const every = [1, 2, 5, 10].find((columns) => columns * step >= 46) ?? 20;
  columns.forEach((column, i) => {
    const height = column.count ? Math.max(2, ((floor - 18) * column.count) / most) : 0;
    const x = i * step + step * 0.12;
    const size = { x, y: floor - height, width: step * 0.76, height, rx: Math.min(3, height / 2) };
    const middle = { x: (i + 0.5) * step, "text-anchor": "middle" };
    chart.append(svg("rect", { class: "column", ...size }, svg("title", {}, full(column))));
    if (column.count && step > 14) {
      const above = { ...middle, class: "count", y: floor - height - 5 };
      chart.append(svg("text", above, String(column.count)));
    }
    if ((i + 1) % every) return;
    chart.append(svg("text", { ...middle, y: HEIGHT - 5 }, named(column.upTo)));
  });
  place.replaceChildren(chart);
}
