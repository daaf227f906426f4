"use strict";
// The trade-off plot: one panel a model, one line a method, the Pareto front of what is shown.

effivlm.plot = (() => {
  const { byId, data, state } = effivlm;
  const TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100];

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const point = (row, place, cost, quality) => {
    const [x] = row.measures[cost] ?? [null];
    const [y, low, high] = row.measures[quality] ?? [null];
    return { row, place, x, y, low: low ?? y, high: high ?? y };
  };

  const pointsOf = (model, cost, quality) =>
    data.rows
      .map((row, place) => point(row, place, cost, quality))
      .filter(({ row, x, y }) =>
        row.model === model && effivlm.isShown(row) && Number.isFinite(x) && Number.isFinite(y));

  // Points that no other beats: none costs at most as much and is at least as good, one strictly.
  const front = (points) => points
    .filter((p) => !points.some((q) =>
      q.x <= p.x && q.y >= p.y && (q.x < p.x || q.y > p.y)))
    .sort((a, b) => a.x - b.x || a.y - b.y);

  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const number = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(1));

  const hover = (p) => {
    const range = p.low === p.high ? "" : ` [${number(p.low)}, ${number(p.high)}]`;
    return `<b>${escaped(p.row.setting)}</b><br>cost ${number(p.x)} %<br>quality ${number(p.y)}${range}`;
  };

  const line = (method, points, bars) => {
    const look = effivlm.look(method);
    const sorted = [...points].sort((a, b) => a.x - b.x);
    return {
      x: sorted.map((p) => p.x), y: sorted.map((p) => p.y),
      text: sorted.map(hover), customdata: sorted.map((p) => p.place),
      hovertemplate: "%{text}<extra></extra>", name: escaped(method), mode: "lines+markers",
      line: { color: look.colour, dash: look.dash, width: 1.6 },
      marker: {
        color: look.colour, symbol: look.symbol,
        size: sorted.map((p) => (p.place === state.selected ? 15 : 8)),
      },
      error_y: {
        type: "data", visible: bars, symmetric: false, thickness: 1, width: 2,
        array: sorted.map((p) => Math.max(0, p.high - p.y)),
        arrayminus: sorted.map((p) => Math.max(0, p.y - p.low)),
      },
    };
  };

  const rings = (points) => ({
    x: points.map((p) => p.x), y: points.map((p) => p.y), mode: "lines+markers", hoverinfo: "skip",
    name: "Pareto front", line: { color: style("--quiet"), dash: "dot", width: 1.2, shape: "hv" },
    marker: { symbol: "circle-open", size: 16, color: style("--text"), line: { width: 1.4 } },
  });

  const original = (p) => ({
    x: [p.x], y: [p.y], mode: "markers", name: "original", text: [hover(p)],
    customdata: [p.place], hovertemplate: "%{text}<extra></extra>",
    marker: { symbol: "star", size: 13, color: style("--text") },
  });

  const layout = (model, points, leftOut, base) => {
    const xs = points.map((p) => p.x).filter((x) => x > 0);
    const wide = xs.length && Math.max(...xs) / Math.min(...xs) >= 8;
    const axis = { gridcolor: style("--line"), zeroline: false, linecolor: style("--line") };
    const lines = base ? [{
      type: "line", xref: "paper", x0: 0, x1: 1, y0: base.y, y1: base.y,
      line: { color: style("--quiet"), width: 1, dash: "dot" },
    }] : [];
    return {
      title: { text: escaped(model) + (leftOut ? `<br><sub>${leftOut} not on these axes</sub>` : ""),
        font: { size: 14 }, x: 0.02, xanchor: "left" },
      paper_bgcolor: style("--back"), plot_bgcolor: style("--back"),
      font: { color: style("--text"), size: 12 }, showlegend: false, hovermode: "closest",
      hoverlabel: { bgcolor: style("--raised"), bordercolor: style("--line"), align: "left",
        font: { color: style("--text") } },
      margin: { l: 52, r: 14, t: 44, b: 58 }, shapes: lines,
      xaxis: { ...axis, type: wide ? "log" : "linear",
        ...(wide ? { tickvals: TICKS, ticktext: TICKS.map(String) } : {}),
        title: { text: shortened(data.costs[byId("cost").value]), font: { size: 12 } } },
      yaxis: { ...axis, title: { text: shortened(data.qualities[byId("quality").value].split(":")[0]),
        font: { size: 12 } } },
    };
  };

  const shortened = (text) => (text.length > 52 ? `${text.slice(0, 50)}…` : text);

  const draw = () => {
    const cost = byId("cost").value;
    const quality = byId("quality").value;
    const models = effivlm.unique(data.rows.map((r) => r.model)).filter((m) => !state.off.models.has(m));
    const holder = byId("panels");
    while (holder.children.length > models.length) {
      Plotly.purge(holder.lastChild);
      holder.lastChild.remove();
    }
    while (holder.children.length < models.length) holder.append(effivlm.make("div", { class: "panel" }));
    models.forEach((model, i) => panel(holder.children[i], model, cost, quality));
  };

  const panel = (node, model, cost, quality) => {
    const points = pointsOf(model, cost, quality);
    const base = points.find((p) => p.row.setting === "none");
    const others = points.filter((p) => p !== base);
    const asked = data.rows.filter((r) => r.model === model && r.setting !== "none" && effivlm.isShown(r));
    const traces = effivlm.methods
      .map((m) => [m, others.filter((p) => p.row.method === m)])
      .filter(([, mine]) => mine.length)
      .map(([m, mine]) => line(m, mine, byId("bars").checked));
    const all = [rings(front(points)), ...traces, ...(base ? [original(base)] : [])];
    const look = layout(model, points, asked.length - others.length, base);
    const options = { responsive: true, displaylogo: false,
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: "trade-off" } };
    Plotly.react(node, all, look, options).then(() => {
      if (node.listening) return;
      node.on("plotly_click", ({ points: [hit] }) => effivlm.select(hit.customdata));
      node.listening = true;
    });
  };

  return { draw, front };
})();
