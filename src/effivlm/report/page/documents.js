"use strict";
// Documents: the list (flips first), and one document with its pictures, answers and kept tokens.

// Chunks of documents: inside the page, or (in the folder `view`) read when they are asked for.
effivlm.chunks = (() => {
  const { data } = effivlm;
  const held = new Map();
  const waiting = new Map();

  const take = (number, chunk) => {
    held.set(number, chunk);
    (waiting.get(number) ?? []).forEach((done) => done(chunk));
    waiting.delete(number);
  };

  const get = (number) => new Promise((done) => {
    if (held.has(number)) return done(held.get(number));
    const block = document.getElementById(`chunk-${number}`);
    if (block) {
      take(number, JSON.parse(block.textContent));
      return done(held.get(number));
    }
    if (!data.lazy) return done(null);
    if (waiting.has(number)) return waiting.get(number).push(done);
    waiting.set(number, [done]);
    const script = effivlm.make("script", { src: `chunks/${number}.js` });
    script.addEventListener("error", () => take(number, null));
    document.head.append(script);
  });

  return { get, take };
})();

effivlm.documents = (() => {
  const { byId, data, make, overlay, state } = effivlm;
  const index = data.documents;
  const MOST = 300; // lines of the list at a time
  const WORDS = {
    "-": "worse", "+": "better", "~": "other words, same score",
    "=": "same answer", "!": "failed", " ": "not asked",
  };
  const view = { setting: "", task: "", marks: "flips", open: null, drawn: null, layer: 0, head: "all",
    what: "tokens", merged: true };

  const label = (row) => (effivlm.unique(data.rows.map((r) => r.model)).length > 1
    ? `${row.model}: ${row.setting}` : row.setting);

  const flips = (marks) => [...marks].filter((m) => "-+!".includes(m)).length;

  // Documents that the choices ask for, those with flips first.
  const chosen = () => {
    const place = view.setting === "" ? null : Number(view.setting);
    const wanted = { flips: "-+!", lost: "-!", gained: "+", changed: "~", all: "-+!~= " }[view.marks];
    const rank = (marks) => (place === null ? -flips(marks) : "-!+~= ".indexOf(marks[place]));
    return index.id
      .map((id, i) => ({ id, i, task: index.tasks[index.task[i]], marks: index.marks[i] }))
      .filter(({ task, marks }) => (view.task === "" || task === view.task)
        && (place === null ? [...marks].some((m) => wanted.includes(m)) : marks[place] !== " " && wanted.includes(marks[place])))
      .sort((a, b) => rank(a.marks) - rank(b.marks) || a.i - b.i);
  };

  const drawList = () => {
    const found = chosen();
    byId("doccount").textContent = `${found.length} of ${index.id.length} documents`
      + (found.length > MOST ? `; the first ${MOST} are listed` : "");
    byId("doclist").replaceChildren(...found.slice(0, MOST).map(entry));
    return found;
  };

  const entry = ({ id, i, task, marks }) => {
    const place = view.setting === "" ? null : Number(view.setting);
    const count = (m) => [...marks].filter((x) => x === m).length;
    const tally = place === null
      ? [make("span", { class: "lost" }, `−${count("-") + count("!")}`), " ",
        make("span", { class: "gained" }, `+${count("+")}`)]
      : [make("span", { class: marks[place] === "+" ? "gained" : "-!".includes(marks[place]) ? "lost" : "quiet" },
        WORDS[marks[place]])];
    return make("li", {}, make("button", { type: "button", "data-document": `${task}/${id}`,
      "aria-current": view.open === i ? "true" : null, onclick: () => open(i) },
    make("span", {}, id, " ", make("small", {}, task)), make("span", { class: "tally" }, ...tally)));
  };

  const open = async (i) => {
    view.open = i;
    const number = Math.floor(i / index.chunk);
    const chunk = await effivlm.chunks.get(number);
    if (view.open !== i) return; // another one was opened meanwhile
    if (!chunk) {
      const why = data.lazy ? `chunks/${number}.js cannot be read: run effivlm view again`
        : "This run is too large for one file: effivlm view RUN shows every document.";
      byId("document").replaceChildren(make("p", { class: "quiet" }, why));
      return;
    }
    show(chunk.documents[i - number * index.chunk], chunk.pictures, index.marks[i], i);
    byId("doclist").querySelectorAll("button").forEach((b) => {
      const here = b.dataset.document === `${index.tasks[index.task[i]]}/${index.id[i]}`;
      if (here) b.setAttribute("aria-current", "true"); else b.removeAttribute("aria-current");
    });
  };

  const show = (doc, pictures, marks, i) => {
    const traced = Object.keys(doc.traces).map(Number);
    const wanted = Number(view.setting || state.selected || -1);
    draw(doc, traced.includes(wanted) ? wanted : traced.find((p) => data.rows[p].setting !== "none") ?? null);
    const pane = make("div", { class: "pane" });
    const text = make("div", {},
      make("p", { class: "quiet" }, `${index.tasks[index.task[i]]} / ${index.id[i]}, scored by ${doc.metric}`),
      doc.prompt === null ? make("p", { class: "quiet" }, "The question was not recorded by the version that wrote this run.")
        : make("p", { class: "question" }, doc.prompt),
      make("p", {}, "expected: ", make("b", {}, doc.references.join(" | "))));
    byId("document").replaceChildren(make("div", { class: "asked" }, pane, text), answers(doc, marks, pane, pictures));
    picture(pane, doc, pictures);
  };

  // Choose the setting that is drawn; what only the cache forgets is looked for there.
  const draw = (doc, place) => {
    view.drawn = place;
    const image = place === null ? null : doc.traces[place].images[0];
    if (image) view.what = image.cache && overlay.inPlay(image, image.depth - 1).every(Boolean) ? "cache" : "tokens";
  };

  // Of the model that is drawn first; there the original's answer, the one drawn, then worse, failed, better, other words, same.
  const answers = (doc, marks, pane, pictures) => {
    const rank = ([place]) => (data.rows[place].setting === "none" ? -2
      : place === view.drawn ? -1 : "-!+~= ".indexOf(marks[place]));
    const model = data.rows[view.drawn ?? Number(view.setting || state.selected || 0)].model;
    const away = ([place]) => Number(data.rows[place].model !== model);
    const lines = [...doc.answers].sort((a, b) => away(a) - away(b) || rank(a) - rank(b) || a[0] - b[0])
      .filter(([place]) => effivlm.isShown(data.rows[place]));
    const row = ([place, answer, score, error, tokens]) => {
      const { setting } = data.rows[place];
      const mark = setting === "none" ? "the original" : WORDS[marks[place]];
      const tone = { "-": "lost", "!": "lost", "+": "gained" }[marks[place]] ?? "quiet";
      return make("tr", { class: place === view.drawn ? "selected" : null, "data-place": place,
        onclick: () => { if (String(place) in doc.traces) { draw(doc, place); picture(pane, doc, pictures); } } },
      make("td", {}, make("code", {}, label(data.rows[place]))),
      make("td", {}, error === null ? answer : make("span", { class: "lost" }, error)),
      make("td", {}, score === null ? "-" : String(Math.round(100 * score))),
      make("td", { class: `mark ${tone}` }, mark));
    };
    const head = ["setting", "answer", "score", ""].map((h) => make("th", {}, h));
    return make("div", { class: "scroll answers" }, make("table", {},
      make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...lines.map(row))));
  };

  // ---- pictures and the tokens on them
  const picture = (pane, doc, pictures) => {
    const trace = view.drawn === null ? null : doc.traces[view.drawn];
    const shown = doc.pictures.map(([name, width, height], k) => {
      const image = trace?.images[k];
      const seen = image ? tilesOf(doc, trace, k) : [];
      const source = pictures[seen.length === 1 ? seen[0] : name];
      const img = source
        ? make("img", { src: source, alt: `picture ${k + 1}`, class: Math.max(width, height) <= 160 ? "small" : null })
        : make("p", { class: "quiet" }, `pictures/${name} is not in the run's folder`);
      const whole = image && image.tiles === 1;
      const holder = make("div", { class: "picture" }, img, ...(whole ? overlay.units(image).slice(-1).map((u) => drawn(image, u)) : []));
      const tiles = image && !whole ? make("div", { class: "tiles" }, ...overlay.units(image).map((u, t) => make("div", { class: "picture" },
        seen[t] ? make("img", { src: pictures[seen[t]], alt: `tile ${t + 1}` }) : null, drawn(image, u)))) : null;
      return make("div", {}, holder, tiles);
    });
    const note = doc.pictures.length ? null : make("p", { class: "quiet" }, "No picture was recorded.");
    pane.replaceChildren(make("div", { class: "pictures" }, ...shown), ...(note ? [note] : []),
      controls(pane, doc, pictures, trace));
    pane.closest("article")?.querySelectorAll(".answers tr[data-place]").forEach((r) =>
      r.classList.toggle("selected", Number(r.dataset.place) === view.drawn));
  };

  // Names of the tiles of a prompt's k-th picture, as the encoder was given them; empty where unknown.
  const tilesOf = (doc, trace, k) => {
    const views = doc.views[data.rows[view.drawn].model] ?? [];
    const counts = trace.images.map((x) => x.tiles);
    const sum = (list) => list.reduce((a, b) => a + b, 0);
    const start = sum(counts.slice(0, k));
    return views.length === sum(counts) ? views.slice(start, start + counts[k]) : [];
  };

  const drawn = (image, unit) => {
    const layer = Math.min(view.layer, image.depth - 1);
    const shares = view.what === "cache" ? overlay.held(image, layer, view.head)
      : overlay.inPlay(image, layer).map(Number);
    return overlay.cells(image, unit, shares, overlay.owners(image, layer), view.merged);
  };

  const controls = (pane, doc, pictures, trace) => {
    const again = () => picture(pane, doc, pictures);
    if (!trace) {
      return make("p", { class: "quiet" },
        "Which tokens were kept was not recorded: keep: true in the experiment, or effivlm explain RUN DOCUMENT SETTING.");
    }
    const image = trace.images[0];
    if (!image) return make("p", { class: "quiet" }, "This prompt has no picture.");
    const layer = Math.min(view.layer, image.depth - 1);
    const set = (name, value) => { view[name] = value; again(); };
    const select = (name, entries) => {
      const node = make("select", { onchange: (event) => set(name, event.target.value), "aria-label": name });
      effivlm.options(node, entries, String(view[name]));
      return node;
    };
    const settings = Object.keys(doc.traces).filter((p) => effivlm.isShown(data.rows[p]));
    const which = make("select", { id: "drawn", "aria-label": "setting drawn",
      onchange: (event) => { draw(doc, Number(event.target.value)); again(); } });
    effivlm.options(which, settings.map((p) => [p, label(data.rows[p])]), String(view.drawn));
    const heads = overlay.heads(image);
    const slider = make("input", { type: "range", min: 0, max: image.depth - 1, value: layer, id: "layer", "aria-label": "layer",
      oninput: (event) => { view.layer = Number(event.target.value); refresh(); } });
    const said = make("span", { class: "quiet" });
    const refresh = () => {
      doc.pictures.forEach((_, k) => redraw(pane, trace.images[k], k));
      said.textContent = caption(trace.images[0]);
    };
    said.textContent = caption(image);
    const tiles = trace.images.some((x) => x.tiles > 1)
      ? make("span", { class: "quiet" }, "Below the picture its tiles, as the encoder was given them.") : null;
    return make("div", { class: "overlay" }, which,
      make("div", {}, select("what", [["tokens", "tokens entering the layer"], ["cache", "entries in the cache"]]),
        view.what === "cache" && heads > 1 ? " " : null,
        view.what === "cache" && heads > 1 ? select("head", [["all", "share of heads"], ...[...Array(heads).keys()].map((h) => [String(h), `head ${h}`])]) : null),
      slider, said, tiles,
      make("label", {}, make("input", { type: "checkbox", checked: view.merged, onchange: (event) => set("merged", event.target.checked) }), " colour merged tokens"));
  };

  const redraw = (pane, image, k) => {
    if (!image) return;
    const spots = pane.querySelectorAll(".pictures > div")[k].querySelectorAll("svg.tokens");
    const units = image.tiles === 1 ? overlay.units(image).slice(-1) : overlay.units(image);
    units.forEach((unit, u) => spots[u].replaceWith(drawn(image, unit)));
  };

  const caption = (image) => {
    const layer = Math.min(view.layer, image.depth - 1);
    const shares = view.what === "cache" ? overlay.held(image, layer, view.head) : overlay.inPlay(image, layer).map(Number);
    const sum = shares.reduce((a, b) => a + b, 0);
    const merged = overlay.owners(image, layer).filter((target, i) => target !== i).length;
    return `layer ${layer} of ${image.depth - 1}: ${Math.round(10 * sum) / 10} of ${image.tokens} visual tokens`
      + (view.what === "cache" ? " in the cache" : "") + (merged ? `, ${merged} merged into others` : "");
  };

  // ---- choices
  const fill = () => {
    effivlm.options(byId("docsetting"), [["", "all settings"],
      ...data.rows.map((r, i) => [String(i), r]).filter(([, r]) => r.setting !== "none").map(([i, r]) => [i, label(r)])], view.setting);
    effivlm.options(byId("doctask"), [["", "all tasks"], ...index.tasks.map((t) => [t, t])], view.task);
    effivlm.options(byId("docmarks"), [["flips", "flips: worse or better"], ["lost", "worse or failed"], ["gained", "better"],
      ["changed", "other words, same score"], ["all", "all, flips first"]], view.marks);
    for (const [id, name] of [["docsetting", "setting"], ["doctask", "task"], ["docmarks", "marks"]]) {
      byId(id).addEventListener("change", (event) => { view[name] = event.target.value; drawList(); });
    }
  };

  // From a row to its documents.
  const openFor = (place) => {
    effivlm.select(place);
    view.setting = data.rows[place].setting === "none" ? "" : String(place);
    byId("docsetting").value = view.setting;
    let found = drawList();
    if (!found.length) {
      view.marks = byId("docmarks").value = "all";
      found = drawList();
    }
    if (found.length) open(found[0].i);
    byId("documents").scrollIntoView({ block: "start" });
  };

  return { drawList, fill, open, openFor };
})();
