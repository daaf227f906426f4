"use strict";
// What is shown and chosen, in one object; every view draws itself from it when it changes.
// Text of users and models only ever enters the page through textContent (`make`), never as markup.

const effivlm = {};

effivlm.read = (id) => JSON.parse(document.getElementById(id).textContent);
effivlm.data = effivlm.read("data");

effivlm.state = {
  off: { models: new Set(), stages: new Set(), methods: new Set() },
  search: "",
  selected: null, // place of a row
  listeners: [],
};

effivlm.onChange = (draw) => effivlm.state.listeners.push(draw);
effivlm.changed = () => effivlm.state.listeners.forEach((draw) => draw());

// A row is shown if its model and method are on, and one of its stages is.
effivlm.isShown = (row) => {
  const { off } = effivlm.state;
  if (off.models.has(row.model)) return false;
  if (row.setting === "none") return true;
  const combined = row.stages.includes("combined");
  const stages = combined ? ["combined"] : row.stages;
  return !off.methods.has(row.method) && stages.some((stage) => !off.stages.has(stage));
};

effivlm.select = (place) => {
  effivlm.state.selected = place;
  effivlm.changed();
};

// An element with attributes and children; strings become text.
effivlm.make = (tag, attributes = {}, ...children) => {
  const svg = ["svg", "rect", "line", "path", "circle", "g", "text"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};

effivlm.byId = (id) => document.getElementById(id);

effivlm.options = (select, entries, chosen) => {
  select.replaceChildren(
    ...entries.map(([value, label]) =>
      effivlm.make("option", { value, selected: value === chosen }, label)),
  );
};

// Colours of Okabe and Ito, and of Tol, told apart under the common colour blindnesses; the marks
// tell methods apart without colour. The darkest is replaced on a dark ground.
effivlm.palette = () => {
  const dark = document.documentElement.classList.contains("dark");
  return [
    dark ? "#4ea3e0" : "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    dark ? "#f0f0f0" : "#000000", "#999933", dark ? "#cf6a9a" : "#882255", "#44AA99",
  ];
};
effivlm.symbols = [
  "circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left",
  "triangle-right", "pentagon",
];
effivlm.dashes = ["solid", "dash", "dot", "dashdot"];

effivlm.unique = (values) => [...new Set(values)];
effivlm.methods = effivlm.unique(
  effivlm.data.rows.filter((r) => r.setting !== "none").map((r) => r.method));

effivlm.look = (method) => {
  const colours = effivlm.palette();
  const i = effivlm.methods.indexOf(method);
  const turn = Math.floor(i / colours.length);
  return {
    colour: colours[i % colours.length],
    symbol: effivlm.symbols[(i + turn) % effivlm.symbols.length],
    dash: effivlm.dashes[turn % effivlm.dashes.length],
  };
};
