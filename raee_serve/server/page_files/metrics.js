// The server's /metrics, in Prometheus' text format: samples by name.

// Map of name -> [{labels, value}].
export function parsed(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue; // a comment
    const [, name, labels = "", value] = match;
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels: labelsOf(labels), value: Number(value) });
  }
  return samples;
}

// Of all series of a metric, or of those with this label.
export function total(samples, name, label, wanted) {
  const series = samples.get(name) ?? [];
  const meant = series.filter(({ labels }) => !label || labels[label] === wanted);
  return meant.reduce((sum, { value }) => sum + value, 0);
}

// [{upTo, count}]: a histogram's buckets, each with what is in it alone, over all its series.
export function buckets(samples, name) {
  const cumulative = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const upTo = labels.le === "+Inf" ? Infinity : Number(labels.le);
    cumulative.set(upTo, (cumulative.get(upTo) ?? 0) + value);
  }
  const sorted = [...cumulative].sort(([one], [other]) => one - other);
  return sorted.map(([upTo, value], i) => ({ upTo, count: value - (i ? sorted[i - 1][1] : 0) }));
}

function labelsOf(text) {
  const pairs = text.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g);
  const unescaped = (value) => value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
  return Object.fromEntries([...pairs].map(([, name, value]) => [name, unescaped(value)]));
}
