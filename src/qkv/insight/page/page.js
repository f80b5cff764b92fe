// The page of a trace: reads the data at its end, and draws. Texts enter the page by textContent only.
"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("trace").textContent);
  const Dv = data.Dv;
  const lane = () => data.lanes[state.lane];
  const state = { lane: 0, row: 0, measure: "weight", order: "key", window: 0, step: 0, play: null, cell: null };
  const byId = (id) => document.getElementById(id);
  root.classList.add("js");

  // ---- elements -------------------------------------------------------------------------------------------------

  function fill(element, properties, children) {
    for (const [name, value] of Object.entries(properties)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children) if (child !== null && child !== undefined) element.append(child);
    return element;
  }
  const el = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);
  const button = (text, onclick, more = {}) => el("button", { type: "button", class: "ctl", onclick, ...more }, text);

  function token(side, at) {
    const text = data.tokens[side][at];
    return text === undefined ? null : el("bdi", { class: "tok" }, text);
  }
  function named(side, start, stop) {
    if (stop - start > 1) return el("span", {}, `${whole(start)} to ${whole(stop - 1)}`);
    return el("span", {}, `${whole(start)} `, token(side, start));
  }

  // ---- numbers: as text.py writes them ---------------------------------------------------------------------------

  const whole = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ",");

  function digits(x, count = 4) {
    if (x === null) return "−∞";
    if (Number.isNaN(x)) return "NaN";
    const sign = x < 0 ? "−" : "", size = Math.abs(x);
    if (size === 0) return "0";
    if (size === Infinity) return sign + "∞";
    const [mantissa, power] = size.toExponential(count - 1).split("e");
    const exponent = Number(power);
    if (exponent < -4) return `${sign}${mantissa}e−${-exponent}`;
    const [left, right] = size.toFixed(Math.max(0, count - 1 - exponent)).split(".");
    return sign + whole(left) + (right ? `.${right}` : "");
  }
  function percent(share) {
    if (Number.isNaN(share)) return "NaN";
    if (share === 0) return "0 %";
    if (share > 0 && share < 5e-5) return "< 0.01 %";
    return `${(100 * share).toFixed(share >= 0.0995 ? 0 : share >= 0.00995 ? 1 : 2)} %`;
  }
  const counted = (n, one, many) => `${whole(n)} ${n === 1 ? one : many || one + "s"}`;

  // ---- packed arrays: as packed.py writes them -------------------------------------------------------------------

  function bytes(text) {
    const raw = atob(text), found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }
  const POWERS = Array.from({ length: 31 }, (_, n) => 2 ** (n - 25));
  const CODES = Array.from({ length: 256 }, (_, n) => (n ? 10 ** (((n - 1) / 254) * 6 - 6) : 0));
  function half(bits) {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1024 + fraction) * POWERS[exponent] : fraction * POWERS[1]);
  }
  const READ = {
    f16: [2, (view, at) => half(view.getUint16(at, true))],
    weight: [2, (view, at) => half(view.getUint16(at, true)) / 1024],
    f32: [4, (view, at) => view.getFloat32(at, true)],
    i32: [4, (view, at) => view.getInt32(at, true)],
    u8: [1, (view, at) => view.getUint8(at)],
    code: [1, (view, at) => CODES[view.getUint8(at)]],
  };
  function unpack(text, kind) {
    const raw = bytes(text), view = new DataView(raw.buffer), [size, read] = READ[kind];
    const found = new Float64Array(raw.length / size);
    for (let i = 0; i < found.length; i++) found[i] = read(view, i * size);
    return found;
  }
  const edge = (length, bins, at) => Math.ceil((at * length) / bins);
  const binOf = (length, bins, at) => Math.floor((at * bins) / length);

  // ---- colours ---------------------------------------------------------------------------------------------------

  let palette = null;
  function colours() {
    if (palette) return palette;
    const style = getComputedStyle(root), of = (name) => style.getPropertyValue(name).trim();
    palette = { ramp: [], shades: [] };
    for (const name of ["paper", "raised", "ink", "soft", "faint", "rule", "accent", "accent-soft", "q", "k", "v", "hid", "sans"]) {
      palette[name] = of(`--${name}`);
    }
    for (let i = 0; i < 16; i++) palette.ramp.push(of(`--m${i}`).match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16)));
    for (let n = 0; n < SHADES; n++) palette.shades.push(mixed(palette.ramp, n / (SHADES - 1)));
    return palette;
  }
  const DECADES = 4, SHADES = 121;
  function mixed(ramp, t) {
    const x = t * (ramp.length - 1), i = Math.min(ramp.length - 2, Math.floor(x)), f = x - i;
    return ramp[i].map((a, n) => Math.round(a + (ramp[i + 1][n] - a) * f));
  }
  // The colour of a value above 0: equal steps of the logarithm, DECADES from the top down.
  function shade(value, top) {
    const t = Math.max(0, Math.min(1, 1 + Math.log10(value / top) / DECADES));
    return colours().shades[Math.round(t * (SHADES - 1))];
  }
  const rgb = (c) => `rgb(${c[0]} ${c[1]} ${c[2]})`;

  // ---- two pens for one drawing: on a canvas, and as SVG -----------------------------------------------------------

  function canvasPen(canvas, width, height, ratio) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    return {
      rect(x, y, w, h, paint) {
        if (paint.fill) { ctx.fillStyle = paint.fill; ctx.fillRect(x, y, w, h); }
        if (paint.stroke) { ctx.strokeStyle = paint.stroke; ctx.lineWidth = paint.width || 1; ctx.strokeRect(x, y, w, h); }
      },
      path(d, paint) {
        const path = new Path2D(d);
        if (paint.fill) { ctx.fillStyle = paint.fill; ctx.fill(path); }
        if (paint.stroke) { ctx.strokeStyle = paint.stroke; ctx.lineWidth = paint.width || 1; ctx.lineJoin = "round"; ctx.stroke(path); }
      },
      text(x, y, words, paint = {}) {
        ctx.save();
        ctx.translate(x, y);
        if (paint.turn) ctx.rotate((paint.turn * Math.PI) / 180);
        ctx.font = `${paint.weight || 400} ${paint.size || 11}px ${colours().sans}`;
        ctx.fillStyle = paint.fill || colours().soft;
        ctx.textAlign = { middle: "center", end: "right" }[paint.anchor] || "left";
        ctx.fillText(words, 0, 0);
        ctx.restore();
      },
      cells(x, y, w, h, rows, columns, colour) {
        const image = new ImageData(columns, rows);
        for (let at = 0; at < rows * columns; at++) {
          const c = colour(at);
          image.data[4 * at] = c[0];
          image.data[4 * at + 1] = c[1];
          image.data[4 * at + 2] = c[2];
          image.data[4 * at + 3] = 255;
        }
        const small = document.createElement("canvas");
        small.width = columns;
        small.height = rows;
        small.getContext("2d").putImageData(image, 0, 0);
        ctx.imageSmoothingEnabled = false;
        ctx.drawImage(small, x, y, w, h);
      },
    };
  }

  const SVG = "http://www.w3.org/2000/svg";
  const svgEl = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);
  const round = (x) => Math.round(x * 100) / 100;

  function svgPen(svg) {
    const painted = (paint) => ({ fill: paint.fill || "none", stroke: paint.stroke, "stroke-width": paint.stroke ? paint.width || 1 : null });
    return {
      rect(x, y, w, h, paint) {
        svg.append(svgEl("rect", { x: round(x), y: round(y), width: round(w), height: round(h), ...painted(paint) }));
      },
      path(d, paint) {
        svg.append(svgEl("path", { d, "stroke-linejoin": "round", ...painted(paint) }));
      },
      text(x, y, words, paint = {}) {
        const transform = paint.turn ? `rotate(${paint.turn} ${round(x)} ${round(y)})` : null;
        svg.append(svgEl("text", {
          x: round(x), y: round(y), transform, fill: paint.fill || colours().soft, "font-size": paint.size || 11,
          "font-weight": paint.weight, "font-family": colours().sans, "text-anchor": paint.anchor,
        }, words));
      },
      cells(x, y, w, h, rows, columns, colour) {
        const pieces = new Map();
        for (let r = 0; r < rows; r++) {
          for (let c = 0; c < columns;) {
            const mine = colour(r * columns + c), key = rgb(mine);
            let stop = c + 1;
            while (stop < columns && colour(r * columns + stop) === mine) stop++;
            pieces.set(key, `${pieces.get(key) || ""}M${c} ${r}h${stop - c}v1h-${stop - c}z`);
            c = stop;
          }
        }
        const transform = `translate(${round(x)} ${round(y)}) scale(${w / columns} ${h / rows})`;
        const group = svgEl("g", { transform, "shape-rendering": "crispEdges" });
        for (const [key, d] of pieces) group.append(svgEl("path", { d, fill: key }));
        svg.append(group);
      },
    };
  }

  // ---- grids: the map, and the windows on it ----------------------------------------------------------------------

  // A grid: rows x columns of values, and where each cell lies among queries and keys.
  function mapGrid() {
    const map = data.map && data.map.values[state.lane], { Lq, Lk } = lane();
    if (!map) return null;
    const values = unpack(map.values, data.map.kind === "f16" ? "weight" : "code");
    if (state.measure === "value") {
      const norms = unpack(data.norms[lane().norms], "f32");
      for (let at = 0; at < values.length; at++) values[at] *= norms[at % map.columns];
    }
    const pools = map.rows !== Lq || map.columns !== Lk;
    return {
      rows: map.rows, columns: map.columns, values, top: largest(values), pools,
      query: (r) => edge(Lq, map.rows, r), key: (c) => edge(Lk, map.columns, c),
      right: profile(data.series.entropy, "f16"), below: profile(data.series.mass, "f32"),
    };
  }
  function profile(series, kind) {
    return series.length ? unpack(series[state.lane], kind) : null;
  }
  function windowGrid() {
    const window = data.windows[state.lane][state.window];
    const rows = window.q[1] - window.q[0], columns = window.k[1] - window.k[0];
    const values = unpack(window.values, "weight");
    if (state.measure === "value") {
      const norms = unpack(window.norms, "f32");
      for (let at = 0; at < values.length; at++) values[at] *= norms[at % columns];
    }
    return {
      rows, columns, values, top: largest(values), pools: false,
      query: (r) => window.q[0] + r, key: (c) => window.k[0] + c, right: null, below: null,
    };
  }
  function largest(values) {
    let top = 0;
    for (const x of values) if (x > top) top = x;
    return top;
  }
  // Of each bin, the first and the last row (or column) of the mask's picture that it touches.
  function touched(length, parts, bins, start) {
    const part = (at) => binOf(length, parts, at);
    return Array.from({ length: bins }, (_, n) => [part(start(n)), part(start(n + 1) - 1)]);
  }
  // 0 hidden, 1 mixed, 2 visible: what the mask's picture says of a cell; -1 where it is another head's.
  let cover = null;
  function covered(grid, r, c) {
    if (!lane().covered) return -1;
    cover = cover || unpack(data.cover.values, "u8");
    const { rows, columns } = data.cover;
    grid.down = grid.down || touched(lane().Lq, rows, grid.rows, grid.query);
    grid.across = grid.across || touched(lane().Lk, columns, grid.columns, grid.key);
    const [i0, i1] = grid.down[r], [j0, j1] = grid.across[c], found = cover[i0 * columns + j0];
    const same = cover[i0 * columns + j1] === found && cover[i1 * columns + j0] === found && cover[i1 * columns + j1] === found;
    return same ? found : 1;
  }

  // Where the parts of a grid's picture lie, for a picture of that width.
  function layout(grid, wide) {
    const margin = grid.right ? 58 : 8, left = 46, above = 30;
    const width = wide - left - margin;
    const height = Math.round(width * Math.max(1 / 3, Math.min(1, grid.rows / grid.columns)));
    return { left, above, width, height, wide, high: above + height + (grid.below ? 58 : 10) };
  }

  function drawGrid(pen, grid, at, frames) {
    const c = colours(), { left, above, width, height } = at;
    const hidden = hexed(c.hid);
    pen.rect(left, above, width, height, { fill: c.paper });
    pen.cells(left, above, width, height, grid.rows, grid.columns, (n) => {
      if (grid.values[n] > 0) return shade(grid.values[n], grid.top);
      return covered(grid, Math.floor(n / grid.columns), n % grid.columns) === 2 ? c.shades[0] : hidden;
    });
    pen.rect(left, above, width, height, { stroke: c.rule });
    const last = [grid.query(grid.rows) - 1, grid.key(grid.columns) - 1];
    pen.text(left, above - 5, whole(grid.key(0)));
    pen.text(left + width / 2, above - 5, "keys", { anchor: "middle" });
    pen.text(left + width, above - 5, whole(last[1]), { anchor: "end" });
    pen.text(left - 6, above + 10, whole(grid.query(0)), { anchor: "end" });
    pen.text(left - 6, above + height - 2, whole(last[0]), { anchor: "end" });
    pen.text(left - 14, above + height / 2, "queries", { anchor: "middle", turn: -90 });
    if (grid.right) drawProfile(pen, grid.right, "entropy", [left + width + 10, above, 44, height], true);
    if (grid.below) drawProfile(pen, grid.below, "weight received", [left, above + height + 10, width, 34], false);
    for (const [n, frame] of frames.entries()) drawFrame(pen, grid, at, frame, n);
  }
  const hexed = (text) => text.match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16));

  function drawProfile(pen, values, name, [x, y, w, h], upright) {
    const c = colours(), top = largest(values) || 1, points = [];
    const size = upright ? h / values.length : w / values.length;
    values.forEach((value, n) => {
      const length = Math.max(0, value / top) * (upright ? w : h), from = n * size, to = (n + 1) * size;
      if (upright) points.push(`${round(x + length)} ${round(y + from)}`, `${round(x + length)} ${round(y + to)}`);
      else points.push(`${round(x + from)} ${round(y + length)}`, `${round(x + to)} ${round(y + length)}`);
    });
    const end = upright ? `${x} ${round(y + h)}` : `${round(x + w)} ${y}`;
    pen.path(`M${x} ${y}L${points.join("L")}L${end}Z`, { fill: upright ? c.q : c.k });
    if (upright) pen.text(x, y - 5, name, { fill: c.q });
    else pen.text(x, y + h + 12, `${name}, up to ${percent(top)} of all`, { fill: c.k });
  }
  function drawFrame(pen, grid, { left, above, width, height }, frame, n) {
    const { Lq, Lk } = lane(), x = (v) => left + (width * v) / Lk, y = (v) => above + (height * v) / Lq, c = colours();
    const side = (a, b) => Math.max(6, b - a);
    const box = [x(frame.k[0]), y(frame.q[0]), side(x(frame.k[0]), x(frame.k[1])), side(y(frame.q[0]), y(frame.q[1]))];
    const moved = [Math.min(box[0], left + width - box[2]), Math.min(box[1], above + height - box[3])];
    pen.rect(moved[0], moved[1], box[2], box[3], { stroke: c.paper, width: 3 });
    pen.rect(moved[0], moved[1], box[2], box[3], { stroke: c.k, width: n === state.window ? 2 : 1.2 });
  }

  // A grid on a canvas that can be read by pointer and by keyboard.
  function viewer(host, says, label, make, frames, chosen) {
    const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": label });
    const over = el("canvas", { class: "over", "aria-hidden": "true" });
    const self = { grid: null, cell: null };
    host.replaceChildren(canvas, over);
    self.draw = () => {
      self.grid = make();
      canvas.hidden = over.hidden = self.grid === null;
      if (!self.grid) return says.replaceChildren(el("p", { class: "mute" }, "The page has no map of this head."));
      self.at = layout(self.grid, Math.max(240, Math.min(584, host.clientWidth || 584)));
      const ratio = Math.min(3, window.devicePixelRatio || 1);
      drawGrid(canvasPen(canvas, self.at.wide, self.at.high, ratio), self.grid, self.at, frames());
      canvas.style.width = over.style.width = `${self.at.wide}px`;
      canvas.style.height = over.style.height = `${self.at.high}px`;
      if (!self.cell || self.cell[0] >= self.grid.rows || self.cell[1] >= self.grid.columns) self.cell = peak(self.grid);
      self.mark();
    };
    self.mark = () => {
      const { left, above, width, height, wide, high } = self.at, [r, c] = self.cell, g = self.grid;
      const pen = canvasPen(over, wide, high, Math.min(3, window.devicePixelRatio || 1));
      const w = width / g.columns, h = height / g.rows, box = [left + c * w, above + r * h, w, h];
      const least = (x, y, a, b) => [x - Math.max(0, 6 - a) / 2, y - Math.max(0, 6 - b) / 2, Math.max(6, a), Math.max(6, b)];
      pen.path(`M${left} ${box[1] + h / 2}H${left + width}M${box[0] + w / 2} ${above}V${above + height}`, { stroke: colours().faint, width: 0.6 });
      pen.rect(...least(...box), { stroke: colours().paper, width: 4 });
      pen.rect(...least(...box), { stroke: colours().ink, width: 1.5 });
      describe(says, g, r, c);
    };
    const point = (event) => {
      const box = canvas.getBoundingClientRect(), g = self.grid, { left, above, width, height } = self.at;
      const c = Math.floor(((event.clientX - box.left - left) / width) * g.columns);
      const r = Math.floor(((event.clientY - box.top - above) / height) * g.rows);
      if (r < 0 || c < 0 || r >= g.rows || c >= g.columns) return false;
      self.cell = [r, c];
      self.mark();
      return true;
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("click", (event) => point(event) && chosen(self.grid, ...self.cell));
    canvas.addEventListener("keydown", (event) => keys(event, self, chosen));
    return self;
  }
  function keys(event, self, chosen) {
    const { rows, columns } = self.grid, [r, c] = self.cell, by = event.shiftKey ? 8 : 1;
    const move = {
      ArrowUp: [r - by, c], ArrowDown: [r + by, c], ArrowLeft: [r, c - by], ArrowRight: [r, c + by],
      Home: [r, 0], End: [r, columns - 1], PageUp: [r - 16, c], PageDown: [r + 16, c],
    }[event.key];
    if (event.key === "Enter") chosen(self.grid, r, c);
    if (!move) return;
    event.preventDefault();
    self.cell = [Math.max(0, Math.min(rows - 1, move[0])), Math.max(0, Math.min(columns - 1, move[1]))];
    self.mark();
  }
  // The largest cell past the first queries, which have few keys to choose from.
  function peak(grid) {
    let best = Math.floor(grid.rows / 4) * grid.columns;
    for (let n = best; n < grid.values.length; n++) if (grid.values[n] > grid.values[best]) best = n;
    return [Math.floor(best / grid.columns), best % grid.columns];
  }
  const measured = (pools) => `${pools ? "mean " : ""}${state.measure === "weight" ? "weight" : "weight × |v|"}`;

  function describe(says, grid, r, c) {
    const q = [grid.query(r), grid.query(r + 1)], k = [grid.key(c), grid.key(c + 1)], value = grid.values[r * grid.columns + c];
    const seen = covered(grid, r, c);
    const what = seen === 0 ? "Hidden by the mask." : seen === 1 && grid.pools ? "The mask shows a part of it." : null;
    const rough = grid.pools && state.measure === "value" ? " (bins: by the mean |v| of their keys)" : "";
    const many = (range) => range[1] - range[0] > 1;
    says.replaceChildren(
      el("span", { class: "mute" }, measured(grid.pools) + rough),
      el("span", { class: "big" }, digits(value, 3)),
      el("p", {}, many(q) ? "queries " : "query ", named("q", ...q)),
      el("p", {}, many(k) ? "keys " : "key ", named("k", ...k)),
      ...(what ? [el("p", { class: "mute" }, what)] : []),
      el("p", { class: "mute small" }, `Arrow keys move, with Shift by 8${rowAt(grid, r) < 0 ? "" : "; Enter or a click opens the query below"}.`),
    );
  }

  // ---- the controls that all sections share ------------------------------------------------------------------------

  function pressed(buttons, value) {
    for (const b of buttons) b.setAttribute("aria-pressed", String(b.dataset.value === String(value)));
  }
  function choices(host, name, options, choose) {
    const made = options.map(([value, text]) => button(text, () => choose(value), { "data-value": value, "aria-pressed": "false" }));
    host.replaceChildren(...(name ? [el("span", { class: "mute" }, name)] : []), ...made);
    return made;
  }
  let measures = [], laneSelect = null;
  function makeBar() {
    const select = el("select", { class: "ctl", "aria-label": "Head", id: "lane", onchange: () => pickLane(Number(select.value)) });
    data.lanes.forEach((lane, n) => select.append(el("option", { value: n }, lane.name)));
    laneSelect = select;
    const step = (by) => () => pickLane((state.lane + by + data.lanes.length) % data.lanes.length);
    const side = (text, by, name) => button(text, step(by), { "aria-label": name, class: "ctl side" });
    const heads = el("div", { class: "group" }, side("‹", -1, "Previous head"), select, side("›", 1, "Next head"));
    const values = el("div", { class: "group", role: "group", "aria-label": "Measure" });
    measures = choices(values, "", [["weight", "weight"], ["value", "weight × |v|"]], (value) => { state.measure = value; draw(); });
    const themes = ["auto", "light", "dark"];
    const theme = button("◐ auto", () => {
      const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % 3];
      if (next === "auto") delete root.dataset.theme;
      else root.dataset.theme = next;
      theme.textContent = `◐ ${next}`;
      theme.setAttribute("aria-label", `Theme: ${next}`);
      palette = null;
      draw();
    }, { id: "theme", "aria-label": "Theme: auto" });
    byId("bar").append(heads, values, el("div", { class: "group push" }, theme));
  }
  function pickLane(n) {
    state.lane = n;
    state.window = 0;
    state.row = Math.min(state.row, Math.max(0, (data.rows[n] || []).length - 1));
    stop();
    state.step = 0;
    draw();
  }

  // ---- heads at a glance ---------------------------------------------------------------------------------------------

  function makeHeads() {
    const table = byId("heads-table"), body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const by = cell.querySelector("button.sort");
      if (by) by.addEventListener("click", () => sortHeads(table, body, cell, column));
    });
    for (const pick of body.querySelectorAll("button.pick")) {
      pick.addEventListener("click", () => pickLane(Number(pick.dataset.lane)));
    }
    if (body.rows.length > 14) table.parentElement.classList.add("tall");
  }
  function sortHeads(table, body, cell, column) {
    const down = cell.getAttribute("aria-sort") !== "descending" && column > 0;
    const up = column === 0 && cell.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    const falls = down || up;
    cell.setAttribute("aria-sort", falls ? "descending" : "ascending");
    const value = (row) => Number(row.cells[column].dataset.v);
    const rows = [...body.rows].sort((a, b) => (falls ? value(b) - value(a) : value(a) - value(b)) || a.dataset.lane - b.dataset.lane);
    body.append(...rows);
  }
  function showHeads() {
    for (const row of byId("heads-table").tBodies[0].rows) row.classList.toggle("on", Number(row.dataset.lane) === state.lane);
  }

  // ---- the map ---------------------------------------------------------------------------------------------------------

  let mapView = null, zoomView = null;
  function makeMap() {
    if (!byId("map-live")) return;
    const label = "Map of weights: queries down, keys across. Arrow keys move, the text beside it reads the bin.";
    const frames = () => (data.windows.length ? data.windows[state.lane] : []);
    mapView = viewer(byId("map-live"), byId("map-says"), label, mapGrid, frames, (grid, r, c) => {
      if (grid.pools) openWindow(grid.query(r), grid.key(c));
      else openRow(grid.query(r));
    });
    if (!byId("zoom-live") || !data.windows.length) return;
    zoomView = viewer(byId("zoom-live"), byId("zoom-says"), "Window of exact weights. Arrow keys move.", windowGrid, () => [], (grid, r) => openRow(grid.query(r)));
  }
  // The window that is nearest to a place of the map.
  function openWindow(query, key) {
    if (!data.windows.length) return;
    const { Lq, Lk } = lane();
    const far = data.windows[state.lane].map((w) => Math.abs((w.q[0] + w.q[1]) / 2 - query) / Lq + Math.abs((w.k[0] + w.k[1]) / 2 - key) / Lk);
    state.window = far.indexOf(Math.min(...far));
    draw();
  }
  const rowOf = (query) => (data.rows[state.lane] || []).findIndex((row) => row.i === query);
  const rowAt = (grid, r) => (grid.pools ? -1 : rowOf(grid.query(r)));
  function openRow(query) {
    const found = rowOf(query);
    if (found < 0) return;
    state.row = found;
    state.step = 0;
    draw();
    byId("query").scrollIntoView();
  }
  function showMap() {
    if (!mapView) return;
    mapView.draw();
    const grid = mapView.grid, ends = byId("map-legend").querySelectorAll("svg text");
    byId("map-legend").hidden = !grid;
    if (grid) [grid.top / 10 ** DECADES, grid.top].forEach((x, n) => { ends[n].textContent = digits(x, 2); });
    showBins(grid);
    if (!zoomView) return;
    const tabs = choices(byId("zoom-tabs"), "", data.windows[state.lane].map((w, n) => [n, w.why]), (n) => { state.window = n; draw(); });
    pressed(tabs, state.window);
    zoomView.draw();
  }
  function showBins(grid) {
    const body = byId("bins-table").tBodies[0];
    if (!grid) return body.replaceChildren();
    const order = [];
    for (let n = 0; n < grid.values.length; n++) {
      if (!(grid.values[n] > 0) || (order.length === 10 && grid.values[n] <= grid.values[order[9]])) continue;
      let at = order.length;
      while (at > 0 && grid.values[order[at - 1]] < grid.values[n]) at--;
      order.splice(at, 0, n);
      order.length = Math.min(order.length, 10);
    }
    body.replaceChildren(...order.map((n) => {
      const r = Math.floor(n / grid.columns), c = n % grid.columns;
      const value = el("td", { class: "n" }, digits(grid.values[n], 3));
      return el("tr", {}, el("td", {}, named("q", grid.query(r), grid.query(r + 1))), el("td", {}, named("k", grid.key(c), grid.key(c + 1))), value);
    }));
    byId("bins-table").tHead.rows[0].cells[2].textContent = measured(true);
  }

  // ---- one query ----------------------------------------------------------------------------------------------------------

  const current = () => (data.rows.length && data.rows[state.lane].length ? data.rows[state.lane][state.row] : null);
  const KINDS = { keys: "i32", visible: "u8", dot: "f32", weight: "f32", norm: "f32", effect: "f32", bias: "f32" };
  function opened(row) {
    if (!row.open) {
      row.open = {};
      for (const [name, kind] of Object.entries(KINDS)) if (row[name]) row.open[name] = unpack(row[name], kind);
      row.open.outs = unpack(row.tiles.outs, "f32");
    }
    return row.open;
  }
  function showQuery() {
    const row = current();
    if (!row) return;
    const open = opened(row), text = token("q", row.i);
    byId("query-who").replaceChildren(`Query ${whole(row.i)} `, text || "", " of ", el("b", {}, lane().name));
    byId("query-says").replaceChildren(...answer(row, open));
    byId("query-rest").textContent = rest(row);
    byId("query-unique").textContent = unique(row.seen);
    showPicker();
    const orders = choices(byId("query-order"), "Keys", [["key", "in their order"], ["weight", "by weight"], ["passed", "by weight × |v|"], ["effect", "by effect"]], (value) => { state.order = value; showQuery(); });
    pressed(orders, state.order);
    const places = [...open.keys.keys()], by = { weight: (n) => open.weight[n], passed: (n) => open.weight[n] * open.norm[n], effect: (n) => open.visible[n] * open.effect[n] }[state.order];
    if (by) places.sort((a, b) => by(b) - by(a) || a - b);
    const most = { weight: 1e-30, passed: 1e-30 };
    for (const n of places) {
      most.weight = Math.max(most.weight, open.weight[n]);
      most.passed = Math.max(most.passed, open.weight[n] * open.norm[n]);
    }
    let total = 0;
    const table = byId("query-table");
    table.tBodies[0].replaceChildren(...places.map((n) => queryRow(row, open, n, (total += open.weight[n]), most)));
    table.parentElement.classList.toggle("tall", places.length > 18);
  }
  function queryRow(row, open, n, total, most) {
    const key = open.keys[n], seen = open.visible[n] === 1, scaled = open.dot[n] * data.scale;
    let score = data.softcap === null ? scaled : data.softcap * Math.tanh(scaled / data.softcap);
    const known = (x) => (Number.isNaN(x) ? "–" : digits(x)), cells = [known(open.dot[n]), known(scaled)];
    if (data.softcap !== null) cells.push(known(score));
    if (data.bias) cells.push(seen ? digits((score += open.bias[n])) : "–");
    const exp = seen && row.top !== null ? Math.exp(Math.min(score - row.top, 50)) : 0;
    cells.push(seen ? "visible" : "hidden", digits(exp), [digits(open.weight[n]), open.weight[n] / most.weight]);
    const passed = open.weight[n] * open.norm[n];
    cells.push(digits(open.norm[n]), [digits(passed), passed / most.passed], digits(total), seen ? percent(open.effect[n]) : "–");
    const made = cells.map((cell) => {
      if (!Array.isArray(cell)) return el("td", { class: "n" }, cell);
      const bar = el("i", { "aria-hidden": "true" });
      bar.style.width = `${round(100 * cell[1])}%`;
      return el("td", { class: "n bar-cell" }, cell[0], bar);
    });
    return el("tr", { class: seen ? null : "hidden" }, el("th", { scope: "row" }, `${whole(key)} `, token("k", key)), ...made);
  }
  function answer(row, open) {
    if (row.seen === 0) return ["It sees no key: its output is 0."];
    let best = 0;
    open.weight.forEach((x, n) => { if (x > open.weight[best]) best = n; });
    const key = open.keys[best], text = data.tokens.k[key];
    const parts = [`Of ${counted(row.seen, "visible key")}, key ${whole(key)}`];
    if (text !== undefined) parts.push(" “", el("bdi", {}, text), "”");
    return [...parts, ` answers best: it has ${percent(open.weight[best])} of the weight.`];
  }
  function rest(row) {
    const end = `lse = ${digits(row.lse || 0)}; the output has length ${digits(row.size || 0)}.`;
    const [count, weight, seen] = row.rest;
    if (!count) return `All keys are listed. ${end}`;
    return `Not listed: ${counted(count, "key")}, ${whole(seen)} of them visible, with ${percent(weight)} of the weight. ${end}`;
  }
  function unique(seen) {
    if (seen <= Dv + 1) return `This row sees ${counted(seen, "key")}, its values have ${whole(Dv)} numbers: unless its values depend on each other, no other weights give this output.`;
    return `This row sees ${whole(seen)} keys, its values have ${whole(Dv)} numbers. Infinitely many other weights give the same output: ` +
      `${whole(Dv + 1)} keys are always enough (Carathéodory). The weights are what this model computed, not the only account of it.`;
  }
  function showPicker() {
    const rows = data.rows[state.lane];
    const pick = (n) => { stop(); state.row = Number(n); state.step = 0; showQuery(); showFlash(); };
    const told = rows.map((row, n) => [n, row]).filter(([, row]) => row.why);
    const tabs = choices(byId("query-picker"), "Query", told.map(([n, row]) => [n, `${row.why} (${whole(row.i)})`]), pick);
    pressed(tabs, state.row);
    if (told.length === rows.length) return;
    const select = el("select", { class: "ctl", "aria-label": "Any query", onchange: () => pick(select.value) });
    const order = rows.map((row, n) => [row.i, n]).sort((a, b) => a[0] - b[0]);
    for (const [i, n] of order) {
      const text = data.tokens.q[i];
      select.append(el("option", { value: n, selected: n === state.row }, text === undefined ? `query ${whole(i)}` : `${whole(i)} ${text}`));
    }
    byId("query-picker").append(select);
  }

  // ---- the tiles of Flash attention -------------------------------------------------------------------------------------------

  let player = null;
  function makeFlash() {
    const host = byId("player");
    if (!host) return;
    const range = el("input", { type: "range", min: 0, value: 0, "aria-label": "Tile", oninput: () => goTo(Number(range.value)) });
    const go = (to) => () => { stop(); goTo(to()); };
    player = {
      range, at: el("span", { class: "at", role: "status", "aria-live": "polite" }),
      first: button("First", go(() => 0)), back: button("Back", go(() => state.step - 1)),
      next: button("Next", go(() => state.step + 1)), last: button("Last", go(() => steps() - 1)),
      play: button("Play", () => (state.play ? stop() : start()), { "aria-pressed": "false" }),
    };
    host.append(player.first, player.back, player.next, player.last, player.play, range, player.at);
    host.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by || event.target === range) return;
      event.preventDefault();
      stop();
      goTo(state.step + by);
    });
  }
  const steps = () => current().tiles.steps.length;
  function goTo(n) {
    state.step = Math.max(0, Math.min(steps() - 1, n));
    showFlash();
  }
  function start() {
    if (state.step >= steps() - 1) goTo(0);
    state.play = setInterval(() => (state.step >= steps() - 1 ? stop() : goTo(state.step + 1)), 900);
    showFlash();
  }
  function stop() {
    clearInterval(state.play);
    state.play = null;
    if (player) { player.play.textContent = "Play"; player.play.setAttribute("aria-pressed", "false"); }
  }
  function showFlash() {
    const row = current();
    if (!row || !player) return;
    const n = state.step, all = steps(), [highest, m, factor, l] = row.tiles.steps[n];
    player.range.max = all - 1;
    player.range.value = n;
    player.at.textContent = `Tile ${n + 1} of ${all}`;
    player.first.disabled = player.back.disabled = n === 0;
    player.next.disabled = player.last.disabled = n === all - 1;
    if (state.play) { player.play.textContent = "Pause"; player.play.setAttribute("aria-pressed", "true"); }
    player.range.setAttribute("aria-valuetext", `Tile ${n + 1}: largest score ${digits(highest)}, m ${digits(m)}, rescale by ${digits(factor)}, l ${digits(l)}`);
    const svg = svgEl("svg", { class: "plot", role: "img", "aria-label": `After tile ${n + 1} of ${all}: m ${digits(m)}, l ${digits(l)}` });
    const size = drawFlash(svgPen(svg));
    svg.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
    byId("flash-live").replaceChildren(svg);
    showTiles(row);
  }
  function showTiles(row) {
    const { width, steps: all } = row.tiles, outs = opened(row).outs, count = outs.length / all.length;
    const cells = ([highest, m, factor, l], n) => [
      `${whole(n * width)} to ${whole(Math.min(lane().Lk, (n + 1) * width) - 1)}`, highest === null ? "none visible" : digits(highest),
      digits(m), digits(factor), digits(l), [...outs.slice(n * count, n * count + Math.min(4, count))].map((x) => digits(x)).join("  "),
    ];
    byId("tiles-table").tBodies[0].replaceChildren(...all.map((step, n) =>
      el("tr", { class: n === state.step ? "now" : null, "aria-current": n === state.step ? "step" : null }, el("th", { scope: "row" }, n + 1), ...cells(step, n).map((text) => el("td", { class: "n" }, text)))));
    const last = [...outs.slice((all.length - 1) * count)].slice(0, 4).map((x) => digits(x)).join(", ");
    const given = row.kernel ? ` The call returned ${row.kernel.slice(0, 4).map((x) => digits(x)).join(", ")}: the largest difference is ${digits(row.off, 2)}.` : "";
    byId("flash-end").textContent = `After the last tile the output begins ${last}.${given}`;
  }
  function drawFlash(pen) {
    const row = current(), c = colours(), all = row.tiles.steps, now = state.step;
    const x0 = 40, wide = 430, each = wide / all.length, x = (n) => x0 + (n + 0.5) * each;
    const scores = all.flatMap(([highest, m]) => [highest, m]).filter((s) => s !== null);
    const low = Math.min(...scores, 0), high = Math.max(...scores, 1e-9), y = (s) => 112 - (84 * (s - low)) / (high - low || 1);
    pen.rect(x0 + now * each, 18, each, 200, { fill: c["accent-soft"] });
    pen.text(x0, 12, "largest score of each tile, and the running maximum m");
    pen.path(`M${x0} 118H${x0 + wide}M${x0} 218H${x0 + wide}`, { stroke: c.rule });
    let line = "";
    all.forEach(([highest, m], n) => {
      if (m !== null && n <= now) line += `${line ? "L" : "M"}${round(x(n) - each / 2)} ${round(y(m))}L${round(x(n) + each / 2)} ${round(y(m))}`;
      if (highest !== null) dot(pen, x(n), y(highest), n <= now ? c.q : c.rule);
    });
    if (line) pen.path(line, { stroke: c.q, width: 1.8 });
    pen.text(x0 - 5, y(high) + 4, digits(high, 3), { anchor: "end" });
    pen.text(x0, 138, "sum l of exp(s − m)");
    const most = Math.max(...all.map((s) => s[3]), 1e-9);
    all.forEach((s, n) => {
      const h = (62 * s[3]) / most;
      if (n <= now) pen.rect(x(n) - each * 0.32, 218 - h, each * 0.64, h, { fill: n === now ? c.accent : c.faint });
      if (n <= now && n > 0 && s[2] < 0.999 && s[2] > 0) pen.text(x(n), 214 - h, `×${digits(s[2], 2)}`, { anchor: "middle", size: 9 });
    });
    const stepped = all.length > 8 ? 2 : 1;
    all.forEach((_, n) => { if (n % stepped === 0) pen.text(x(n), 232, whole(n * row.tiles.width), { anchor: "middle", size: 10 }); });
    pen.text(x0 + wide, 248, "first key of each tile", { anchor: "end" });
    if (narrow()) drawOutput(pen, row, now, x0, 272);
    else drawOutput(pen, row, now, x0 + wide + 40, 0);
    return flashSize();
  }
  const dot = (pen, x, y, fill) => pen.path(`M${round(x - 3.2)} ${round(y)}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z`, { fill });
  const narrow = () => byId("flash-live").clientWidth < 560;
  const flashSize = () => (narrow() ? [480, 500] : [740, 254]);
  function drawOutput(pen, row, now, left, top) {
    const c = colours(), outs = opened(row).outs, count = outs.length / row.tiles.steps.length, wide = narrow() ? 430 : 215;
    const end = outs.slice(outs.length - count), at = outs.slice(now * count, (now + 1) * count);
    const most = Math.max(1e-12, ...[...outs].map(Math.abs)), middle = left + wide / 2, gap = 200 / Math.max(1, count);
    pen.text(left, top + 12, `output so far${Dv > count ? `, ${count} of ${Dv} numbers` : ""}; | the end`);
    pen.path(`M${middle} ${top + 18}V${top + 218}`, { stroke: c.rule });
    for (let n = 0; n < count; n++) {
      const y = top + 18 + n * gap + gap / 2, w = (at[n] / most) * (wide / 2 - 4), e = middle + (end[n] / most) * (wide / 2 - 4);
      pen.rect(Math.min(middle, middle + w), y - 6, Math.abs(w), 12, { fill: c.v });
      pen.path(`M${round(e)} ${round(y - 9)}V${round(y + 9)}`, { stroke: c.ink, width: 1.6 });
    }
  }

  // ---- pictures as files ----------------------------------------------------------------------------------------------------------

  const PAINTED = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "font-family", "font-size", "font-weight"];
  // A picture of the server with its style in attributes, so that it looks the same elsewhere.
  function standing(svg) {
    const copy = svg.cloneNode(true), from = [svg, ...svg.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
    from.forEach((node, n) => {
      const style = getComputedStyle(node);
      to[n].removeAttribute("class");
      for (const name of PAINTED) if (style.getPropertyValue(name)) to[n].setAttribute(name, style.getPropertyValue(name));
    });
    const box = svg.viewBox.baseVal;
    return framed(copy, box.width, box.height);
  }
  function framed(svg, width, height) {
    svg.setAttribute("xmlns", SVG);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    const title = svg.querySelector("title");
    const paper = svgEl("rect", { width, height, fill: colours().paper });
    if (title) title.after(paper);
    else svg.prepend(paper);
    return { svg, width, height };
  }
  // The pictures that scripts draw, by either pen.
  function drawn(name) {
    const view = name === "map" ? mapView : name === "zoom" ? zoomView : null;
    if (name === "flash") return { width: flashSize()[0], height: flashSize()[1], draw: drawFlash };
    if (!view || !view.grid) return null;
    const frames = name === "map" && data.windows.length ? data.windows[state.lane] : [];
    return { width: view.at.wide, height: view.at.high, draw: (pen) => drawGrid(pen, view.grid, view.at, frames) };
  }
  function pictureOf(name) {
    const live = drawn(name);
    if (!live) return standing(byId(`fig-${name}`).querySelector("svg"));
    const svg = svgEl("svg", {});
    live.draw(svgPen(svg));
    return framed(svg, live.width, live.height);
  }
  function canvasOf(name) {
    const live = drawn(name), canvas = el("canvas"), scale = 2;
    const { svg, width, height } = live || standing(byId(`fig-${name}`).querySelector("svg"));
    const pen = canvasPen(canvas, width, height, scale);
    pen.rect(0, 0, width, height, { fill: colours().paper });
    if (live) live.draw(pen);
    else paint(canvas.getContext("2d"), svg);
    return canvas;
  }
  // Paints an SVG of rectangles, paths and texts, with its style in attributes. An <img> would do, and would need a
  // policy that allows images; this page loads nothing.
  function paint(ctx, node) {
    const get = (name) => node.getAttribute(name), number = (name) => Number(get(name)) || 0;
    ctx.save();
    for (const [, name, inner] of (get("transform") || "").matchAll(/(\w+)\(([^)]*)\)/g)) {
      const [a, b] = inner.split(/[ ,]+/).map(Number);
      if (name === "rotate") ctx.rotate((a * Math.PI) / 180);
      else ctx[name](a, b === undefined ? a : b);
    }
    const path = { rect: () => `M${number("x")} ${number("y")}h${number("width")}v${number("height")}h${-number("width")}z`, path: () => get("d") }[node.tagName];
    if (path) {
      const shape = new Path2D(path());
      ctx.setLineDash((get("stroke-dasharray") || "").match(/[\d.]+/g) || []);
      for (const way of ["fill", "stroke"]) {
        if (!get(way) || get(way) === "none") continue;
        ctx[`${way}Style`] = get(way);
        ctx.globalAlpha = Number(get(`${way}-opacity`) || 1);
        ctx.lineWidth = parseFloat(get("stroke-width")) || 1;
        ctx[way](shape);
      }
    } else if (node.tagName === "text") {
      ctx.font = `${get("font-weight")} ${get("font-size")} ${get("font-family")}`;
      ctx.fillStyle = get("fill");
      ctx.textAlign = { middle: "center", end: "right" }[get("text-anchor")] || "left";
      ctx.fillText(node.textContent, number("x"), number("y"));
    } else for (const child of node.children) paint(ctx, child);
    ctx.restore();
  }
  function save(blob, name) {
    const url = URL.createObjectURL(blob), link = el("a", { href: url, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
  function makeSaves() {
    for (const by of document.querySelectorAll("button.save")) {
      by.addEventListener("click", () => {
        const { of, kind } = by.dataset, name = `qkv-${of}.${kind}`;
        if (kind === "svg") save(new Blob([new XMLSerializer().serializeToString(pictureOf(of).svg)], { type: "image/svg+xml" }), name);
        else canvasOf(of).toBlob((blob) => save(blob, name), "image/png");
      });
    }
  }

  // ---- together ------------------------------------------------------------------------------------------------------------------

  function draw() {
    laneSelect.value = state.lane;
    pressed(measures, state.measure);
    showHeads();
    showMap();
    showQuery();
    showFlash();
  }
  // In a notebook's frame a link to a part of the page would load the notebook: its address is that of srcdoc.
  for (const link of document.querySelectorAll("a[href^='#']")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      byId(link.getAttribute("href").slice(1)).scrollIntoView();
    });
  }
  if (!data.lanes.length) return;
  makeBar();
  makeHeads();
  makeMap();
  makeFlash();
  makeSaves();
  draw();
  let width = root.clientWidth;
  addEventListener("resize", () => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    showMap();
    showFlash();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { palette = null; draw(); });
})();
