"use strict";
// The tokens that were kept, drawn on the picture: decoder layer by layer, cache head by head,
// merged tokens in the colour of the token they went into.

effivlm.overlay = (() => {
  const { make } = effivlm;

  const bits = (digits, n) => {
    const out = [];
    for (const digit of digits) {
      const value = parseInt(digit, 16);
      for (const bit of [8, 4, 2, 1]) out.push((value & bit) > 0);
    }
    return out.slice(0, n);
  };

  // [n] true where a token is in play at the entry of a decoder layer.
  const inPlay = (image, layer) => {
    const [, digits] = image.layers.filter(([from]) => from <= layer).at(-1);
    return bits(digits, image.tokens);
  };

  // [n] share of KV heads (or one head: 0 or 1) whose cache holds a token of a layer.
  const held = (image, layer, head) => {
    if (!image.cache) return inPlay(image, layer).map(Number);
    const heads = image.cache[layer].map((digits) => bits(digits, image.tokens));
    if (head !== "all") return heads[Math.min(Number(head), heads.length - 1)].map(Number);
    return heads[0].map((_, i) => heads.filter((h) => h[i]).length / heads.length);
  };

  const heads = (image) => (image.cache ? Math.max(...image.cache.map((h) => h.length)) : 1);

  // [n] the token each token went into by `layer`, itself where it stayed or was dropped.
  const owners = (image, layer) => {
    const owner = [...Array(image.tokens).keys()];
    for (const [at, into, from] of image.merged) {
      if (at <= layer) into.forEach((target, e) => { if (from[e] !== target) owner[from[e]] = target; });
    }
    return owner.map((first) => {
      let last = first;
      for (let step = 0; step < image.tokens && owner[last] !== last; step += 1) last = owner[last];
      return last;
    });
  };

  // [n] unit, row, column.
  const places = (image) => image.places
    ?? [...Array(image.tokens).keys()].map((i) => [0, Math.floor(i / image.grid[1]), i % image.grid[1]]);

  const hue = (token) => `hsl(${(token * 137.508) % 360} 75% 50%)`;

  const cells = (image, unit, shares, owner, showMerged) => {
    const mine = places(image).map((place, i) => ({ place, i })).filter(({ place }) => place[0] === unit && place[1] >= 0);
    const rows = Math.max(...mine.map(({ place }) => place[1])) + 1;
    const columns = Math.max(...mine.map(({ place }) => place[2])) + 1;
    const gathered = new Set(owner.filter((target, i) => target !== i));
    const svg = make("svg", { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", class: "tokens",
      role: "img", "aria-label": "tokens kept" });
    for (const { place: [, row, column], i } of mine) {
      const part = showMerged && (owner[i] !== i || gathered.has(i));
      const kept = shares[i] > 0;
      const shade = `rgba(var(--shade), ${(0.82 * (1 - shares[i])).toFixed(3)})`;
      svg.append(make("rect", {
        x: column, y: row, width: 1, height: 1, "data-token": i, "data-kept": shares[i].toFixed(2),
        style: part
          ? `fill:${hue(owner[i])};fill-opacity:${kept ? 0.6 : 0.34};stroke:${hue(owner[i])};stroke-width:.06`
          : `fill:${shade};stroke:${kept ? "var(--accent)" : "none"};stroke-width:.07`,
      }));
      if (part && kept) svg.append(make("circle", { cx: column + 0.5, cy: row + 0.5, r: 0.16, fill: "#fff", stroke: "#000", "stroke-width": 0.05 }));
    }
    return svg;
  };

  const units = (image) => effivlm.unique(places(image).filter((p) => p[1] >= 0).map((p) => p[0]));

  return { bits, cells, heads, held, inPlay, owners, units };
})();
