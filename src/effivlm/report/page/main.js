"use strict";
// Fills the page once and wires what changes it.

(() => {
  const { byId, data, make, state } = effivlm;

  const summary = () => {
    const models = effivlm.unique(data.rows.map((r) => r.model));
    const settings = effivlm.unique(data.rows.map((r) => r.setting)).length - 1;
    byId("title").textContent = data.title;
    byId("summary").textContent =
      `${models.join(", ")}: ${settings} settings beside the original, ${data.documents.id.length} documents of `
      + `${data.documents.tasks.length} tasks${data.environment.date ? `; ${data.environment.date}` : ""}`;
  };

  const symbol = (method) => {
    const look = effivlm.look(method);
    const shapes = {
      circle: "M6 1a5 5 0 1 0 .01 0z", square: "M1.5 1.5h9v9h-9z", "triangle-up": "M6 1l5 9.5H1z",
      diamond: "M6 .5L11.5 6 6 11.5.5 6z", "triangle-down": "M1 1.5h10L6 11z",
      cross: "M4 1h4v3h3v4H8v3H4V8H1V4h3z", x: "M2.5 1L6 4.2 9.5 1 11 2.5 7.8 6 11 9.5 9.5 11 6 7.8 2.5 11 1 9.5 4.2 6 1 2.5z",
      "triangle-left": "M1 6L10.5 1v10z", "triangle-right": "M11 6L1.5 1v10z", pentagon: "M6 .8l5.3 3.9-2 6.2H2.7L.7 4.7z",
    };
    return make("svg", { viewBox: "0 0 12 12" }, make("path", { d: shapes[look.symbol], fill: look.colour }));
  };

  const chips = (id, title, values, icon) => {
    const off = state.off[id];
    byId(id).replaceChildren(...(values.length > 1 ? [make("span", {}, title), ...values.map((value) => make("button", {
      type: "button", class: "chip", "data-value": value, "aria-pressed": String(!off.has(value)),
      title: "click: show or hide; double-click: only this",
      onclick: () => { if (off.has(value)) off.delete(value); else off.add(value); effivlm.changed(); },
      ondblclick: () => { values.forEach((v) => off.add(v)); off.delete(value); effivlm.changed(); },
    }, icon ? icon(value) : null, value))] : []));
  };

  const filters = () => {
    chips("models", "models", effivlm.unique(data.rows.map((r) => r.model)));
    chips("stages", "where", effivlm.unique(data.rows.flatMap((r) => r.stages)));
    chips("methods", "methods", effivlm.methods, symbol);
  };

  const chosen = () => {
    byId("chosen").hidden = state.selected === null;
    if (state.selected === null) return;
    byId("code").textContent = data.rows[state.selected].setting;
  };

  const copied = async () => {
    const text = byId("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      byId("copy").textContent = "copied";
    } catch {
      getSelection().selectAllChildren(byId("code")); // where a page may not write: marked, to be copied by hand
      byId("copy").textContent = "marked";
    }
    setTimeout(() => { byId("copy").textContent = "copy"; }, 1500);
  };

  const axes = () => {
    const known = (key) => data.rows.some((r) => r.setting !== "none" && Number.isFinite(r.measures[key]?.[0]));
    const entries = (labels) => Object.entries(labels).filter(([key]) => known(key));
    const costs = entries(data.costs);
    const cost = costs.some(([key]) => key === "prompt_kv_share") ? "prompt_kv_share" : costs[0]?.[0];
    const qualities = entries(data.qualities);
    effivlm.options(byId("cost"), costs, cost);
    effivlm.options(byId("quality"), qualities, qualities.some(([key]) => key === "op") ? "op" : qualities[0]?.[0]);
    for (const id of ["cost", "quality", "bars"]) byId(id).addEventListener("change", effivlm.plot.draw);
  };

  const facts = (id, entries) => byId(id).replaceChildren(
    ...entries.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));

  const rest = () => {
    facts("legend", data.columns.map((c) => [c.title, c.help]));
    facts("environment", Object.entries(data.environment));
    byId("notes").replaceChildren(...data.notes.map((note) => make("p", {}, `Note: ${note}.`)));
    byId("over").hidden = !data.joined.length;
    const line = (kind, cells) => make("tr", {}, ...cells.map((c, i) => make(kind, { class: i ? null : "left" }, c)));
    byId("joined").replaceChildren(make("table", {},
      make("thead", {}, line("th", ["setting", "models", "mean OP", "OG over models"])),
      make("tbody", {}, ...data.joined.map((j) => line("td", [j.setting, String(j.models), j.op.toFixed(1), j.og.toFixed(1)])))));
  };

  const theme = () => {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)");
    const set = (dark) => { root.classList.toggle("dark", dark); filters(); effivlm.plot.draw(); };
    root.classList.toggle("dark", system.matches);
    system.addEventListener("change", () => set(system.matches));
    byId("theme").addEventListener("click", () => set(!root.classList.contains("dark")));
  };

  summary();
  theme();
  axes();
  rest();
  effivlm.table.menu();
  effivlm.documents.fill();
  [filters, chosen, effivlm.plot.draw, effivlm.table.draw].forEach(effivlm.onChange);
  effivlm.changed();
  const first = effivlm.documents.drawList();
  if (first.length) effivlm.documents.open(first[0].i);
  byId("search").addEventListener("input", (event) => { state.search = event.target.value; effivlm.table.draw(); });
  byId("copy").addEventListener("click", copied);
  byId("open").addEventListener("click", () => effivlm.documents.openFor(state.selected));
  document.body.dataset.ready = "true";
})();
