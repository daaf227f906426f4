"use strict";
// The table of settings: sorted, filtered, the original pinned on top, columns hidden or not.

effivlm.table = (() => {
  const { byId, data, make, state } = effivlm;
  const order = { column: null, down: true };
  const columns = data.columns.map((column) => ({ ...column, on: !column.hidden }));

  const several = effivlm.unique(data.rows.map((r) => r.model)).length > 1;

  const matches = ({ setting, model }) => {
    const text = `${model} ${setting}`.toLowerCase();
    return state.search.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  };

  const places = () => {
    const every = data.rows.map((row, place) => ({ row, place })).filter(({ row }) => effivlm.isShown(row));
    const pinned = every.filter(({ row }) => row.setting === "none");
    const others = every.filter(({ row }) => row.setting !== "none" && matches(row));
    if (order.column !== null) others.sort((a, b) => compared(a.row, b.row));
    return { pinned, others };
  };

  const compared = (a, b) => {
    const [x, y] = [a, b].map((row) => row.cells[order.column].value);
    const [s, t] = [a, b].map((row) => row.cells[order.column].text);
    const missing = (v) => v === null || v === undefined;
    if (missing(x) && missing(y)) return (order.down ? -1 : 1) * s.localeCompare(t, "en", { numeric: true });
    if (missing(x) || missing(y)) return missing(x) ? 1 : -1; // what has no number stays below
    return order.down ? y - x : x - y;
  };

  // Ends of all intervals of a column: the bars of one column share a scale.
  const scale = (i) => {
    const ends = data.rows.flatMap((r) => [r.cells[i].low, r.cells[i].high]).filter(Number.isFinite);
    return ends.length ? [Math.min(...ends), Math.max(...ends)] : null;
  };
  const scales = columns.map((_, i) => scale(i));

  const bar = (cell, [least, most], base) => {
    const x = (value) => (most > least ? 2 + (80 * (value - least)) / (most - least) : 42);
    const svg = make("svg", { class: "bar", viewBox: "0 0 84 5", preserveAspectRatio: "none" });
    const width = Math.max(1.5, x(cell.high) - x(cell.low));
    svg.append(make("rect", { x: x(cell.low), y: 1, width, height: 3, rx: 1 }));
    if (Number.isFinite(base)) svg.append(make("line", { x1: x(base), x2: x(base), y1: 0, y2: 5 }));
    return svg;
  };

  const cell = (row, i, bases) => {
    const { text, low, high, alarm } = row.cells[i];
    const classes = [columns[i].left ? "left" : "", columns[i].key === "model" ? "model-column" : "", alarm ? "alarm" : "", columns[i].key === "setting" ? "sticky" : ""];
    const node = make("td", { class: classes.join(" ").trim() || null }, text);
    if (columns[i].key === "setting" && several) node.append(make("small", { class: "model" }, row.model));
    const base = bases[row.model]?.cells[i];
    if (Number.isFinite(low) && Number.isFinite(high) && scales[i] && text) {
      node.append(bar({ low, high }, scales[i], base && base.low === base.high ? base.low : NaN));
    }
    return node;
  };

  const line = ({ row, place }, pinned, bases) => {
    const chosen = place === state.selected;
    const shown = columns.map((c, i) => (c.on ? cell(row, i, bases) : null));
    return make("tr", {
      class: [pinned ? "pinned" : "", chosen ? "selected" : ""].join(" ").trim() || null,
      "data-setting": row.setting, "data-model": row.model, tabindex: 0,
      onclick: () => effivlm.select(place),
      ondblclick: () => effivlm.documents.openFor(place),
      onkeydown: (event) => { if (event.key === "Enter") effivlm.documents.openFor(place); },
    }, ...shown);
  };

  const head = () => make("tr", {}, ...columns.map((column, i) => (column.on ? make("th", {
    "data-key": column.key, class: [column.left ? "left" : "", column.key === "model" ? "model-column" : "", column.key === "setting" ? "sticky" : ""].join(" ").trim() || null,
    title: column.help, scope: "col", tabindex: 0,
    "aria-sort": order.column === i ? (order.down ? "descending" : "ascending") : null,
    onclick: () => sortBy(i),
    onkeydown: (event) => { if (event.key === "Enter") sortBy(i); },
  }, column.title) : null)));

  const sortBy = (i) => {
    if (order.column === i && !order.down) order.column = null; // third click: as asked
    else {
      order.down = order.column !== i;
      order.column = i;
    }
    draw();
  };

  const draw = () => {
    const { pinned, others } = places();
    const bases = Object.fromEntries(data.rows.filter((r) => r.setting === "none").map((r) => [r.model, r]));
    byId("table").tHead.replaceChildren(head());
    byId("table").tBodies[0].replaceChildren(
      ...pinned.map((x) => line(x, true, bases)), ...others.map((x) => line(x, false, bases)));
    const all = data.rows.filter((r) => r.setting !== "none").length;
    byId("count").textContent = `${others.length} of ${all} settings; click a row to choose it, click a heading to sort`;
    const height = byId("table").tHead.offsetHeight;
    let top = height;
    for (const row of byId("table").querySelectorAll("tr.pinned")) {
      for (const node of row.cells) node.style.top = `${top}px`;
      top += row.offsetHeight;
    }
  };

  const menu = () => byId("columnlist").replaceChildren(...columns.map((column) =>
    make("label", { title: column.help },
      make("input", { type: "checkbox", checked: column.on,
        onchange: (event) => { column.on = event.target.checked; draw(); } }), ` ${column.title}`)));

  return { draw, menu };
})();
